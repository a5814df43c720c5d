"""Reading TinyImageNet from its folder: 200 classes, 100,000 training and 10,000 test images of 64 x 64 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = "tiny-imagenet-200"
SIZE = 64


def load(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read TinyImageNet from `data_dir`, or from `data_dir`/tiny-imagenet-200, into memory (1.4 GB as bytes).

    The test half is the one that the data set calls "val": the labels of the one called "test" are not public.

    Returns:
        The training and the test half, each of images, uint8, shape (count, 3, 64, 64), and labels, int64,
        shape (count,). Classes are numbered in the order of wnids.txt.

    Raises:
        FileNotFoundError: it is not there; the message says where to get it.
    """
    folder = next((place for place in (data_dir, data_dir / FOLDER) if (place / "wnids.txt").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"TinyImageNet is not in {data_dir}. Unpack http://cs231n.stanford.edu/{FOLDER}.zip, and name the "
            "folder that holds wnids.txt with --data-dir"
        )
    classes = {name: number for number, name in enumerate((folder / "wnids.txt").read_text("utf-8").split())}
    train = [
        (path, number) for name, number in classes.items() for path in sorted((folder / "train" / name).rglob("*.JPEG"))
    ]
    lines = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text("utf-8").splitlines()]
    test = [(folder / "val" / "images" / line[0], classes[line[1]]) for line in lines]
    return _read(train), _read(test)


def _read(images: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    from PIL import Image

    pixels = torch.empty(len(images), 3, SIZE, SIZE, dtype=torch.uint8)
    for number, (path, _) in enumerate(images):
        with Image.open(path) as image:  # some are gray
            pixels[number] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels, torch.tensor([label for _, label in images], dtype=torch.int64)
