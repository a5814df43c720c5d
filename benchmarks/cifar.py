"""Finding and reading CIFAR-10 and -100: torchvision's files, or one folder of images per class."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Half = tuple[Tensor, Tensor]

SIZE = 32
NAMES = {"cifar10": ("CIFAR-10", "cifar-10-batches-py"), "cifar100": ("CIFAR-100", "cifar-100-python")}
# Channel means and deviations of the training images between 0 and 1, as published.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
CACHE = "decoded.npz"


def load(name: str, data_dir: Path) -> tuple[Half, Half]:
    """Read "cifar10" or "cifar100" from folders of images, or as torchvision does, which may download it.

    Folders of images are `data_dir`/`name`/train/CLASS/IMAGE and test/CLASS/IMAGE, or the same in `data_dir` itself.
    They are decoded once: the pixels stay beside them in a file `decoded.npz`, which is made anew when images change.

    Returns:
        The training and the test half, each of images, uint8, shape (count, 3, 32, 32), and labels, int64,
        shape (count,). Classes are numbered in alphabetical order.

    Raises:
        FileNotFoundError: it is nowhere, and cannot be downloaded; the message says what to do.
        ValueError: the folders have other classes than the data set, or an image has another size.
    """
    for folder in (data_dir / name, data_dir):
        if all((folder / half).is_dir() for half in ("train", "test")):
            return _read_folder(folder, classes=int(name.removeprefix("cifar")))
    try:
        return _read_torchvision(name, data_dir, train=True), _read_torchvision(name, data_dir, train=False)
    except (OSError, RuntimeError) as error:
        title, folder_name = NAMES[name]
        raise FileNotFoundError(
            f"{title} is not in {data_dir} and could not be downloaded ({error}). Unpack "
            f"https://www.cs.toronto.edu/~kriz/{title.lower()}-python.tar.gz, and name the folder that holds "
            f"{folder_name}, or one with folders train/CLASS and test/CLASS of images, with --data-dir"
        ) from error


def _read_torchvision(name: str, data_dir: Path, *, train: bool) -> Half:
    from torchvision import datasets

    found = getattr(datasets, name.upper())(str(data_dir), train=train, download=True)
    return torch.as_tensor(found.data).permute(0, 3, 1, 2), torch.as_tensor(found.targets)


def _read_folder(folder: Path, classes: int) -> tuple[Half, Half]:
    files = {half: _images_of(folder / half, classes) for half in ("train", "test")}
    known = "\n".join(f"{path} {path.stat().st_mtime_ns}" for half in files.values() for path, _ in half)
    digest = zlib.crc32(known.encode())
    cached = _read_cache(folder / CACHE, digest)
    if cached is None:
        cached = {half: _decode([path for path, _ in found]) for half, found in files.items()}
        _write_cache(folder / CACHE, digest, cached)
    train, test = (
        (torch.from_numpy(cached[half]).permute(0, 3, 1, 2), torch.tensor([label for _, label in found]))
        for half, found in files.items()
    )
    return train, test


def _images_of(half: Path, classes: int) -> list[tuple[Path, int]]:
    names = sorted(path.name for path in half.iterdir() if path.is_dir())
    if len(names) != classes:
        raise ValueError(f"{half} must hold {classes} folders, one per class, got {len(names)}")
    numbered = [
        (number, label, path)
        for label, name in enumerate(names)
        for number, path in enumerate(sorted((half / name).iterdir()))
    ]
    return [(path, label) for _, label, path in sorted(numbered)]  # all classes in turn: the first n hold each


def _decode(paths: list[Path]) -> np.ndarray:
    from PIL import Image

    pixels = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{path} must have {SIZE} x {SIZE} pixels, got {image.size[0]} x {image.size[1]}")
            pixels[number] = np.array(image.convert("RGB"))
    return pixels


def _read_cache(path: Path, digest: int) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path) as stored:
        return {half: stored[half] for half in ("train", "test")} if int(stored["digest"]) == digest else None


def _write_cache(path: Path, digest: int, pixels: dict[str, np.ndarray]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.npz")  # runs in other processes may read the old one
    try:
        np.savez(unfinished, digest=digest, **pixels)
        os.replace(unfinished, path)
    except PermissionError:  # a shared folder: decoded again next time
        unfinished.unlink(missing_ok=True)
