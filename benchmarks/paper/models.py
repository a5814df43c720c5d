"""The models of the SAP paper (Diao et al., ICLR 2023, arXiv 2302.05601), and any of timm's.

Initial values: convolutions by He's rule over the outgoing connections, biases 0, everything else PyTorch's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = (128, 256)
CNN_WIDTH = 64
NAMES = ("linear", "mlp", "cnn", "resnet18", "wresnet28x8")


def build(name: str, *, in_chans: int, image_size: int, num_classes: int, width: int | None = None) -> nn.Module:
    """Make a model of the paper by its name, or one of timm's.

    Args:
        name: "linear", "mlp", "cnn", "resnet18" (pre-activation), "wresnet28x8", or the name of a model of timm
            ("resnet50" is the paper's).
        in_chans: channels of an image.
        image_size: pixels a side.
        num_classes: classes.
        width: channels of the first convolution of "cnn"; None is the paper's 64.

    Raises:
        ValueError: there is no such model, or `width` was given for another one than "cnn".
    """
    if width is not None and name != "cnn":
        raise ValueError(f"width must be left out but for the model cnn, got width={width} for {name}")
    features = in_chans * image_size**2
    if name == "linear":
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))
    elif name == "mlp":
        model = perceptron((features, *HIDDEN, num_classes))
    elif name == "cnn":
        model = cnn(in_chans, num_classes, width or CNN_WIDTH)
    elif name == "resnet18":
        model = PreActivationResNet(in_chans, num_classes, stem=64, widths=(64, 128, 256, 512), blocks=2)
    elif name == "wresnet28x8":
        model = PreActivationResNet(in_chans, num_classes, stem=16, widths=(128, 256, 512), blocks=4)
    else:
        return _timm(name, in_chans, num_classes)
    initialize(model)
    return model


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, from the flat image to the classes, with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(in_chans: int, num_classes: int, width: int) -> nn.Sequential:
    """Four times convolution, batch norm, ReLU and max pooling, doubling the width; the mean; a linear layer."""
    channels = [in_chans, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))


class PreActivationResNet(nn.Module):
    """Residual network for small images with norm and ReLU before each convolution.

    Args:
        in_chans: channels of an image.
        num_classes: classes.
        stem: channels of the first convolution.
        widths: channels of each stage; every stage but the first halves the image.
        blocks: residual blocks of each stage.

    Source: He et al., "Identity mappings in deep residual networks", ECCV 2016; Zagoruyko and Komodakis, "Wide
    residual networks", BMVC 2016 (28 layers: a stem, 3 stages of 4 blocks of 2, shortcuts not counted, and the head).
    """

    def __init__(self, in_chans: int, num_classes: int, *, stem: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        inputs = stem
        for number, outputs in enumerate(widths):
            for block in range(blocks):
                stages.append(_Block(inputs, outputs, stride=2 if number > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (count, classes), of images, shape (count, channels, height, width)."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        active = F.relu(self.norm1(features))
        shortcut = features if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active)))) + shortcut
        return out


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Set the initial values as the paper's code has them, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _timm(name: str, in_chans: int, num_classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model must be one of {', '.join(NAMES)} or a model of timm, got {name!r}")
    model: nn.Module = timm.create_model(name, in_chans=in_chans, num_classes=num_classes)
    return model
