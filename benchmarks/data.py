"""The data sets of the benchmarks: digits, FashionMNIST, CIFAR-10 and -100, TinyImageNet and folders of images.

`load` gives a `Dataset` of two splits. A split yields batches of normalized images and labels on its device.
Small data sets lie in memory and are shuffled, resized and augmented there, a batch at a time; folders of
images are read by a DataLoader.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cifar
import fashion_mnist
import tiny_imagenet
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor], Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagefolder")
DEFAULT_DATA_DIR = Path("data")

# The usual normalization of color photographs (torchvision, timm).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Split(Protocol):
    """The training or the test half of a data set."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def to(self, device: torch.device) -> Split:
        """Return this split with its batches on `device`."""
        ...

    def resized(self, image_size: int) -> Split:
        """Return this split with square images of `image_size` pixels."""
        ...

    def batches(self, batch_size: int, *, shuffle: bool = False) -> Iterator[Batch]:
        """Yield every image once; with `shuffle` in random order, augmented, and whole batches only."""
        ...


@dataclass(frozen=True)
class MemorySplit:
    """Images and labels that lie in memory.

    Args:
        images: normalized images, float32, shape (count, channels, height, width).
        labels: class numbers, int64, shape (count,).
        image_size: batches are resized to this many pixels a side; None leaves them as they are.
        augment: what is done to a shuffled batch.
    """

    images: Tensor
    labels: Tensor
    image_size: int | None = None
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> MemorySplit:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def resized(self, image_size: int) -> MemorySplit:
        return replace(self, image_size=image_size)

    def batches(self, batch_size: int, *, shuffle: bool = False) -> Iterator[Batch]:
        # The order is drawn on the CPU, so that a seed gives the same one on every device.
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        if shuffle and len(self) > batch_size:
            order = order[: len(self) - len(self) % batch_size]
        for chosen in order.to(self.labels.device).split(batch_size):
            images = self.images[chosen]
            if shuffle and self.augment is not None:
                images = self.augment(images)
            yield _resize(images, self.image_size), self.labels[chosen]


@dataclass(frozen=True)
class FolderSplit:
    """Images that are read from a folder, a batch at a time.

    Args:
        folder: a torchvision ImageFolder.
        image_size: pixels a side.
        device: where the batches go.
        workers: processes that read images; 0 reads them in this one.
    """

    folder: ImageFolder
    image_size: int
    device: torch.device | str = "cpu"
    workers: int = 2

    def __len__(self) -> int:
        return len(self.folder)

    def to(self, device: torch.device) -> FolderSplit:
        return replace(self, device=device)

    def resized(self, image_size: int) -> FolderSplit:
        return replace(self, image_size=image_size)

    def batches(self, batch_size: int, *, shuffle: bool = False) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        folder = copy.copy(self.folder)
        folder.transform = _photograph_transform(self.image_size, augment=shuffle)
        on_gpu = torch.device(self.device).type == "cuda"
        drop = shuffle and len(folder) > batch_size
        loader = DataLoader(folder, batch_size, shuffle, num_workers=self.workers, drop_last=drop, pin_memory=on_gpu)
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Dataset:
    """A classification problem: two splits, and what a model has to know of them."""

    name: str
    train: Split
    test: Split
    in_chans: int
    image_size: int
    num_classes: int

    def to(self, device: torch.device) -> Dataset:
        """Return the data set with its batches on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def resized(self, image_size: int) -> Dataset:
        """Return the data set with square images of `image_size` pixels."""
        train, test = self.train.resized(image_size), self.test.resized(image_size)
        return replace(self, train=train, test=test, image_size=image_size)


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set by its name.

    Args:
        name: "digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet" or "imagefolder".
        data_dir: where the data lie, or are downloaded to (default: `data`); "imagefolder" needs it.

    Raises:
        ValueError: there is no such data set, or "imagefolder" was asked for without `data_dir`.
        FileNotFoundError: the data are nowhere, and cannot be downloaded; the message says what to do.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(Path(data_dir or DEFAULT_DATA_DIR))
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(data_dir or DEFAULT_DATA_DIR))
    if name == "tiny-imagenet":
        halves = tiny_imagenet.load(Path(data_dir or DEFAULT_DATA_DIR))
        return _in_memory(name, *halves, augment=random_crop_and_flip)
    if name == "imagefolder":
        if data_dir is None:
            raise ValueError("imagefolder needs a data_dir with the folders train and val (or test) in it")
        return _imagefolder(Path(data_dir))
    raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")


def first(split: Split, images: int | None) -> Split:
    """Return a split of its first images only; None is all of them.

    Raises:
        ValueError: the split has fewer images, or does not lie in memory.
    """
    if images is None:
        return split
    if not isinstance(split, MemorySplit) or images > len(split):
        raise ValueError(f"images must be at most {len(split)}, of a data set in memory, got images={images}")
    return replace(split, images=split.images[:images], labels=split.labels[:images])


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Mirror half of the images and shift each by up to `padding` pixels: the usual augmentation of CIFAR.

    Args:
        images: shape (count, channels, height, width), on any device.
        padding: pixels around each image, its own reflection as in the paper's code, out of which a window of the old
            size is cut.

    Returns:
        The same shape, channels last in memory.
    """
    count, _, height, width = images.shape
    # Drawn on the CPU, so that a seed gives the same images on every device.
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1)).to(images.device)
    mirrored = (torch.rand(count, 1) < 0.5).to(images.device)
    rows = torch.arange(height, device=images.device) + top
    columns = torch.arange(width, device=images.device) + left
    columns = torch.where(mirrored, width + 2 * padding - 1 - columns, columns)
    padded = F.pad(images, [padding] * 4, mode="reflect").permute(0, 2, 3, 1)
    numbers = torch.arange(count, device=images.device)[:, None, None]
    return padded[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _digits() -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fixed half of each class is the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    # Eight pixels are too few for the strides of most networks; twelve are enough, and fast.
    return _in_memory("digits", (images[train], targets[train]), (images[test], targets[test])).resized(12)


def _fashion_mnist(data_dir: Path) -> Dataset:
    return _in_memory("fashion-mnist", *fashion_mnist.load(data_dir))


def _cifar(name: str, data_dir: Path) -> Dataset:
    # Channels last in memory, as convolutions on a CPU want them; the augmentation keeps it so.
    train, test = (
        (pixels.contiguous(memory_format=torch.channels_last), labels) for pixels, labels in cifar.load(name, data_dir)
    )
    return _in_memory(name, train, test, augment=random_crop_and_flip, statistics=cifar.STATISTICS[name])


def _imagefolder(data_dir: Path) -> Dataset:
    from torchvision.datasets import ImageFolder

    held_out = next((data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), None)
    if held_out is None or not (data_dir / "train").is_dir():
        raise FileNotFoundError(
            f"{data_dir} must hold a folder train, and a folder val or test, with one folder a class in each"
        )
    train, test = ImageFolder(str(data_dir / "train")), ImageFolder(str(held_out))
    if train.classes != test.classes:
        raise ValueError(f"{data_dir}: the classes of train and {held_out.name} differ")
    splits = FolderSplit(train, 224), FolderSplit(test, 224)
    return Dataset("imagefolder", *splits, in_chans=3, image_size=224, num_classes=len(train.classes))


def _in_memory(
    name: str, train: Batch, test: Batch, augment: Augment | None = None, statistics: Statistics | None = None
) -> Dataset:
    """Make a data set of raw pixels; each channel gets mean 0 and deviation 1 over the training images.

    With `statistics`, these are the channels' means and deviations, of pixels between 0 and 1.
    """
    pixels = train[0].float()
    if statistics is None:
        mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    else:
        mean, std = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in statistics)
    return Dataset(
        name,
        MemorySplit((pixels - mean) / std, train[1], augment=augment),
        MemorySplit((test[0].float() - mean) / std, test[1]),
        in_chans=pixels.shape[1],
        image_size=pixels.shape[-1],
        num_classes=int(train[1].max()) + 1,
    )


def _photograph_transform(image_size: int, *, augment: bool) -> Any:
    from torchvision import transforms

    if augment:
        crop = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(image_size / 0.875)), transforms.CenterCrop(image_size)]
    finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose([*crop, *finish])


def _resize(images: Tensor, image_size: int | None) -> Tensor:
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
