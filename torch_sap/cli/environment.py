"""Versions and devices, for reports of issues."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import torch_sap

PACKAGES = ("numpy", "timm", "transformers", "lightning", "safetensors", "torch-pruning")
"""Others that the library works with."""


def environment() -> dict[str, str]:
    """Versions of the library, of what it runs on, and of what it works with, by name; "-" for what is missing."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple MPS")
    return {
        "torch_sap": torch_sap.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cuda": torch.version.cuda or "-",
        "devices": ", ".join([f"CPU ({torch.get_num_threads()} threads)", *devices]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
