"""Finding and reading FashionMNIST: Debian's package, a folder of one's own, or torchvision's download."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read FashionMNIST from Debian's folder, from `data_dir`, or download it there.

    Returns:
        The training and the test half, each of images, uint8, shape (count, 1, 28, 28), and labels, int64,
        shape (count,).

    Raises:
        FileNotFoundError: it is nowhere, and cannot be downloaded; the message says what to install.
    """
    folder = find(data_dir) or _download(data_dir)
    return _read_half(folder, "train"), _read_half(folder, "test")


def find(data_dir: Path) -> Path | None:
    """Return the first folder that holds all four files, plain or gzipped, or None."""
    for folder in (DEBIAN_FOLDER, data_dir, data_dir / "FashionMNIST" / "raw"):
        if all(_path(folder, name) for half in _FILES.values() for name in half):
            return folder
    return None


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes, plain or gzipped (format: http://yann.lecun.com/exdb/mnist).

    Two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as a big-endian
    32-bit integer, then the entries, the last dimension running fastest.

    Raises:
        ValueError: the file is not such a file, or is cut short.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:start]!r}")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} must hold {shape} entries after its header, got {len(content) - start} bytes")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


def _read_half(folder: Path, half: str) -> tuple[Tensor, Tensor]:
    images, labels = (read_idx(path) for name in _FILES[half] if (path := _path(folder, name)))
    return images[:, None], labels.long()


def _path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(data_dir: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"FashionMNIST is not in {DEBIAN_FOLDER}, not in {data_dir}, and could not be downloaded "
            f"({error}). Install Debian's package with `apt-get install dataset-fashion-mnist`, or put its four "
            "idx files into a folder and name it with --data-dir"
        ) from error
    return data_dir / "FashionMNIST" / "raw"
