"""A timm model for a data set, and the device and threads to train it with."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from data import Dataset
from safetensors.torch import save_file
from torch import nn

import torch_sap

SMALL_MODEL = 1_000_000


def build(name: str, dataset: Dataset, image_size: int | None = None) -> tuple[nn.Module, Dataset]:
    """Make a timm model for a data set, and resize the images to what the model takes.

    Args:
        name: of a model of timm.
        dataset: gives the channels, the classes and the size of the images.
        image_size: pixels per side; None leaves the images as they are, or takes the model's size where it is fixed.

    Raises:
        ValueError: timm has no such model, or it cannot take such images.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5] or difflib.get_close_matches(name, timm.list_models())
        raise ValueError(f"model must be one of timm's, got {name!r}; similar: {', '.join(similar) or 'none'}")
    config = timm.get_pretrained_cfg(name)
    own_size = config.input_size[-1] if config is not None and config.fixed_input_size else None
    sizes: dict[str, Any] = {"img_size": image_size} if own_size and image_size else {}
    try:
        model = timm.create_model(name, in_chans=dataset.in_chans, num_classes=dataset.num_classes, **sizes)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with these settings: {error}") from error
    if size := image_size or own_size:
        dataset = dataset.resized(size)
    shape = (dataset.in_chans, dataset.image_size, dataset.image_size)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot take images of shape {shape}; try --image-size ({error})") from error
    return model, dataset


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the GPU where CUDA finds one, and the CPU elsewhere.

    Raises:
        ValueError: PyTorch has no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device must be one that PyTorch finds here, got {name!r} ({first_line})") from error
    return torch.device(name)


def set_threads(model: nn.Module, threads: int | None) -> None:
    """Set the threads that PyTorch uses on the CPU; None is one for a small model, and PyTorch's choice for others."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    if threads or weights < SMALL_MODEL:
        # Two threads gain a small model little, and on busy cores they wait for each other: 54 s an epoch, not 2 s.
        torch.set_num_threads(threads or 1)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a plain state_dict with zeros where the model is pruned; the model itself keeps its masks."""
    permanent = torch_sap.remove(copy.deepcopy(model)).state_dict()
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    save_file({key: value.contiguous().clone() for key, value in permanent.items()}, path)
