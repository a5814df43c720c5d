"""The images that the benchmarks read, and the training loop that they share."""

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import cifar
import data
import fashion_mnist
import torchvision
import training
from PIL import Image


def no_network(*arguments, **settings):
    raise RuntimeError("no network")


def test_digits_are_normalized_and_split_class_by_class_without_leakage():
    digits = data.load("digits")
    images, labels = next(digits.train.batches(7))
    assert images.shape == (7, digits.in_chans, digits.image_size, digits.image_size) == (7, 1, 12, 12)
    assert (images.dtype, labels.dtype, digits.num_classes) == (torch.float32, torch.int64, 10)
    assert (len(digits.train), len(digits.test)) == (898, 899)
    assert abs(digits.train.images.mean()) < 1e-5
    assert abs(digits.train.images.std() - 1) < 1e-5
    train, test = ({image.numpy().tobytes() for image in half.images} for half in (digits.train, digits.test))
    assert len(train) == 898
    assert not train & test
    shares = digits.test.labels.bincount() / (digits.test.labels.bincount() + digits.train.labels.bincount())
    assert ((shares - 0.5).abs() < 0.005).all()
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(digits.test.images, data.load("digits").test.images)


def test_batches():
    split = data.MemorySplit(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10), augment=lambda images: 2 * images)
    in_order, shuffled = list(split.batches(4)), list(split.batches(4, shuffle=True))
    assert [labels.tolist() for _, labels in in_order] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.cat([images.flatten() for images, _ in in_order]), torch.arange(10.0))
    labels = torch.cat([labels for _, labels in shuffled])
    assert [len(labels) for _, labels in shuffled] == [4, 4]  # only whole ones
    assert len(labels.unique()) == 8
    assert torch.equal(torch.cat([images.flatten() for images, _ in shuffled]), 2.0 * labels)
    assert [len(labels) for _, labels in split.batches(64, shuffle=True)] == [10]


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(classes, monkeypatch, tmp_path):
    class Fake:
        def __init__(self, root, train, download):
            self.data = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
            self.targets = [number % classes for number in range(100)]

    monkeypatch.setattr(torchvision.datasets, f"CIFAR{classes}", Fake)
    cifar = data.load(f"cifar{classes}")
    assert next(cifar.train.batches(5, shuffle=True))[0].shape == (5, 3, 32, 32)
    assert (cifar.in_chans, cifar.image_size, cifar.num_classes) == (3, 32, classes)
    monkeypatch.setattr(torchvision.datasets, f"CIFAR{classes}", no_network)
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-{classes} is not in .*--data-dir"):
        data.load(f"cifar{classes}", tmp_path)


def write_cifar(folder, train=3, size=32, classes=10):
    """One gray image per class and number, each of another brightness."""
    for half, count in (("train", train), ("test", 1)):
        for label in range(classes):
            (folder / half / f"class{label}").mkdir(parents=True)
            for number in range(count):
                gray = 10 * label + number + (100 if half == "test" else 0)
                Image.new("RGB", (size, size), (gray,) * 3).save(
                    folder / half / f"class{label}" / f"{number:04}.webp", lossless=True
                )


@pytest.mark.parametrize("place", ["cifar10", "."])
def test_cifar10_from_folders_of_images(place, monkeypatch, tmp_path):
    write_cifar(tmp_path / place)
    cifar10 = data.load("cifar10", tmp_path)
    assert (cifar10.in_chans, cifar10.image_size, cifar10.num_classes) == (3, 32, 10)
    assert (len(cifar10.train), len(cifar10.test)) == (30, 10)
    assert cifar10.train.labels.tolist() == [*range(10)] * 3  # in turn, so that the first images hold all classes
    red = 0.2470 * cifar10.train.images[:, 0] + 0.4914  # the published deviation and mean
    shown = torch.tensor([10 * label + number for number in range(3) for label in range(10)])
    assert torch.allclose(255 * red, shown.view(-1, 1, 1).float().expand(30, 32, 32), atol=1e-3)
    assert (tmp_path / place / "decoded.npz").exists()

    monkeypatch.setattr(Image, "open", no_network)
    assert torch.equal(data.load("cifar10", tmp_path).train.images, cifar10.train.images)  # from the cache
    monkeypatch.undo()
    Image.new("RGB", (32, 32), (255,) * 3).save(tmp_path / place / "train" / "class0" / "0000.webp", lossless=True)
    changed = data.load("cifar10", tmp_path).train.images
    assert changed[0].mean() > 1 > cifar10.train.images[0].mean()
    assert torch.equal(changed[1:], cifar10.train.images[1:])


def test_a_cifar10_folder_that_cannot_be_written_is_decoded_every_time(monkeypatch, tmp_path):
    def refuse(*paths):
        raise PermissionError("read-only")

    write_cifar(tmp_path)
    monkeypatch.setattr(cifar.os, "replace", refuse)
    assert len(data.load("cifar10", tmp_path).train) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_folders_that_are_not_cifar10(tmp_path):
    write_cifar(tmp_path / "few", classes=9)
    with pytest.raises(ValueError, match="train must hold 10 folders, one per class, got 9"):
        data.load("cifar10", tmp_path / "few")
    write_cifar(tmp_path / "large", size=33)
    with pytest.raises(ValueError, match=r"0000.webp must have 32 x 32 pixels, got 33 x 33"):
        data.load("cifar10", tmp_path / "large")


def test_crops_are_windows_of_the_reflected_image_half_of_them_mirrored():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    found = data.random_crop_and_flip(image.expand(400, 3, 16, 16).clone())
    assert found.shape == (400, 3, 16, 16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    padded = nn.functional.pad(image, [4] * 4, mode="reflect")[0]
    windows = {}
    for mirrored in (False, True):
        for top in range(9):
            for left in range(9):
                window = padded[:, top : top + 16, left : left + 16]
                window = window.flip(2) if mirrored else window
                windows[window.contiguous().numpy().tobytes()] = (mirrored, top, left)
    places = [windows[crop.contiguous().numpy().tobytes()] for crop in found]
    assert 150 < sum(mirrored for mirrored, _, _ in places) < 250
    assert {top for _, top, _ in places} == {left for _, _, left in places} == set(range(9))
    assert len({top - left for _, top, left in places}) > 9  # drawn apart


def write_images(root, half, classes):
    for label in classes:
        (root / half / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (12, 10), (40 * number,) * 3).save(root / half / label / f"{number}.png")


def test_a_folder_of_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a folder train"):
        data.load("imagefolder", tmp_path)
    write_images(tmp_path, "train", ("cat", "dog"))
    write_images(tmp_path, "val", ("cat", "dog"))
    folder = data.load("imagefolder", tmp_path).resized(8)
    folder = replace(folder, train=replace(folder.train, workers=0), test=replace(folder.test, workers=0))
    images, labels = next(folder.test.batches(4))
    assert (images.shape, labels.tolist(), folder.num_classes) == ((4, 3, 8, 8), [0, 0, 0, 1], 2)
    assert next(folder.train.batches(4, shuffle=True))[0].shape == (4, 3, 8, 8)
    write_images(tmp_path / "other", "train", ("cat", "dog"))
    write_images(tmp_path / "other", "test", ("cat", "cow"))
    with pytest.raises(ValueError, match="classes of train and test differ"):
        data.load("imagefolder", tmp_path / "other")


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(("place", "suffix"), [(".", ".gz"), ("FashionMNIST/raw", "")])
def test_fashion_mnist(monkeypatch, tmp_path, place, suffix):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*--data-dir"):
        data.load("fashion-mnist", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    for folder in (tmp_path / place, tmp_path / "debian"):
        for name, count in (("train", 20), ("t10k", 10)):
            write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", pixels[:count])
            write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
        assert fashion_mnist.find(tmp_path) == folder  # Debian's package comes first
        found = data.load("fashion-mnist", tmp_path)
        assert (found.train.images.shape, len(found.test)) == ((20, 1, 28, 28), 10)
        assert (found.in_chans, found.image_size, found.num_classes) == (1, 28, 10)
    stored = fashion_mnist.read_idx(tmp_path / place / f"train-images-idx3-ubyte{suffix}")
    assert torch.equal(stored, torch.as_tensor(pixels, dtype=torch.uint8))
    for content, rule in ((b"\0\0\r\1", "is not an idx"), (b"\0\0\x08\1\0\0\0\5abc", "must hold .* got 3 bytes")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=rule):
            fashion_mnist.read_idx(tmp_path / "a")


def test_tiny_imagenet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"TinyImageNet is not in .*wnids.txt with --data-dir"):
        data.load("tiny-imagenet", tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    for gray, name in ((200, "n02"), (50, "n01")):
        (folder / "train" / name / "images").mkdir(parents=True)
        Image.new("L", (64, 64), gray).save(folder / "train" / name / "images" / "0.JPEG")
    Image.new("RGB", (64, 64), (50, 50, 50)).save(folder / "val" / "images" / "val_0.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")
    tiny = data.load("tiny-imagenet", tmp_path)
    assert (tiny.in_chans, tiny.image_size, tiny.num_classes) == (3, 64, 2)
    assert (tiny.train.labels.tolist(), tiny.test.labels.tolist()) == ([0, 1], [1])  # in the order of wnids.txt
    assert torch.equal(tiny.test.images[0], tiny.train.images[1])
    assert tiny.train.images[0].mean() > 0 > tiny.train.images[1].mean()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of digits, .*, got 'mnist'"):
        data.load("mnist")
    with pytest.raises(ValueError, match="needs a data_dir"):
        data.load("imagefolder")
    with pytest.raises(ValueError, match=r"images must be at most 898, .* got images=2000"):
        data.first(data.load("digits").train, 2000)


def small_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def trained(seed, on_epoch=None, **recipe):
    training.seed_everything(seed)
    model = small_model()
    return model, training.fit(model, data.load("digits").resized(8).train, training.Recipe(**recipe), on_epoch)


def test_training_learns_the_digits_and_a_seed_repeats_it_to_the_bit():
    test, epochs = data.load("digits").resized(8).test, []
    model, metrics = trained(0, lambda epoch, loss: epochs.append(epoch), epochs=3)
    assert epochs == [1, 2, 3]
    assert training.evaluate(small_model(), test)["accuracy"] < 0.4
    assert training.evaluate(model, test)["accuracy"] > 0.9
    again, same = trained(0, epochs=3)
    assert metrics == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_evaluation_counts_every_image_and_keeps_the_mode():
    images, labels = torch.eye(3).view(3, 3, 1, 1), torch.tensor([0, 1, 1])
    model = nn.Flatten()
    found = training.evaluate(model.train(), data.MemorySplit(images, labels), batch_size=2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(torch.eye(3), labels).item())
    assert model.training
