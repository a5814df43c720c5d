"""The paper's models have the paper's shapes; the data sets that the paper uses beside FashionMNIST can be read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torch_sap

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import data
import paper_models

FASHION = {"in_chans": 1, "image_size": 28, "num_classes": 10}
CIFAR = {"in_chans": 3, "image_size": 32, "num_classes": 10}


def shapes_of(model):
    return [tuple(getattr(module, name).shape) for module, name in torch_sap.prunable_parameters(model)]


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_linear_and_mlp():
    assert shapes_of(paper_models.build("linear", **FASHION)) == [(10, 784)]
    model = paper_models.build("mlp", **FASHION)
    assert shapes_of(model) == [(128, 784), (256, 128), (10, 256)]
    assert sum(rows * columns for rows, columns in shapes_of(model)) == 135_680  # as the authors' runs count


@pytest.mark.parametrize(("width", "channels"), [(None, (64, 128, 256, 512)), (16, (16, 32, 64, 128))])
def test_cnn(width, channels):
    model = paper_models.build("cnn", width=width, **CIFAR)
    convolutions = [(b, a, 3, 3) for a, b in zip((3, *channels[:-1]), channels, strict=True)]
    assert shapes_of(model) == [*convolutions, (10, channels[-1])]
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert [type(module) for module in model][:16] == 4 * block


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        # 11.17 million is what others count for the pre-activation ResNet18 of CIFAR-10.
        ("resnet18", 1 + 2 * 8 + 3 + 1, 11_172_170),
        # Zagoruyko and Komodakis count 23.4 million for WRN-28-8: 28 layers with three shortcuts and the head.
        ("wresnet28x8", 1 + 2 * 12 + 3 + 1, 23_354_842),
    ],
)
def test_residual_networks(name, layers, parameters):
    model = paper_models.build(name, **CIFAR)
    assert len(shapes_of(model)) == layers
    assert size_of(model) == parameters
    shapes = {}
    model.norm.register_forward_hook(lambda module, inputs, output: shapes.update(last=tuple(output.shape)))
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert shapes["last"][2:] == (32 // 2 ** (3 if name == "resnet18" else 2),) * 2


def test_norm_and_relu_come_before_the_convolution():
    block = paper_models.build("resnet18", **CIFAR).blocks[0]
    seen = []
    for name, module in block.named_children():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    block(torch.randn(2, 64, 8, 8))
    assert seen == ["norm1", "conv1", "norm2", "conv2"]


def test_initial_values():
    model = paper_models.build("cnn", **CIFAR)
    assert all(not module.bias.any() for module in model if isinstance(module, nn.Conv2d | nn.Linear))
    torch.manual_seed(0)
    weight = paper_models.build("cnn", **CIFAR)[8].weight  # 128 to 256 channels: deviation sqrt(2 / (256 * 9))
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_models_of_timm():
    pytest.importorskip("timm")
    model = paper_models.build("test_resnet", **FASHION)
    assert model.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"model must be one of linear, .* or a model of timm, got 'mlq'"):
        paper_models.build("mlq", **FASHION)
    with pytest.raises(ValueError, match="width must be left out but for the model cnn, got width=8 for mlp"):
        paper_models.build("mlp", width=8, **FASHION)


def test_cifar100(monkeypatch, tmp_path):
    torchvision = pytest.importorskip("torchvision")

    class Fake:
        def __init__(self, root, train, download):
            self.data = np.full((100, 32, 32, 3), 7, dtype=np.uint8)
            self.data[:, 0] = 9
            self.targets = list(range(100))

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    assert data.load("cifar100").num_classes == 100

    def no_network(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-100 is not in .*no network.*cifar-100-python.tar.gz"):
        data.load("cifar100", tmp_path)


def test_tiny_imagenet(tmp_path):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError, match=r"TinyImageNet is not in .*wnids.txt with --data-dir"):
        data.load("tiny-imagenet", tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    for grey, name in ((200, "n02"), (50, "n01")):
        (folder / "train" / name / "images").mkdir(parents=True)
        image.new("L", (64, 64), grey).save(folder / "train" / name / "images" / "0.JPEG")
    image.new("RGB", (64, 64), (50, 50, 50)).save(folder / "val" / "images" / "val_0.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")
    tiny = data.load("tiny-imagenet", tmp_path)
    assert (tiny.in_chans, tiny.image_size, tiny.num_classes) == (3, 64, 2)
    assert tiny.train.labels.tolist() == [0, 1]  # in the order of wnids.txt
    assert tiny.test.labels.tolist() == [1]
    assert torch.equal(tiny.test.images[0], tiny.train.images[1])
    assert tiny.train.images[0].mean() > 0 > tiny.train.images[1].mean()


@pytest.mark.slow
def test_resnet50_of_timm_is_the_papers():
    pytest.importorskip("timm")
    model = paper_models.build("resnet50", in_chans=3, image_size=64, num_classes=200)
    assert size_of(model) == 25_557_032 - (1000 - 200) * 2049  # 25.6 million with the 1000 classes of ImageNet
