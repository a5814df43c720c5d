"""Check the paths of outputs before the work begins."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from torch_sap.arguments import needs


def check_outputs(arguments: Namespace) -> None:
    """Raise unless the files that a command is to write can be written.

    Raises:
        OSError: if a path is a folder, or its folder does not exist or is not writable.
        ValueError: if the suffix of a figure is unknown.
        ImportError: if a figure is asked for and matplotlib is not installed.
    """
    for option in ("csv", "plot"):
        path = getattr(arguments, option, None)
        if path is not None:
            _check_file(f"--{option}", path)
    if (plot := getattr(arguments, "plot", None)) is not None:
        with needs("a figure", "matplotlib", "plot"):
            from matplotlib.figure import Figure
        known = Figure().canvas.get_supported_filetypes()
        if plot.suffix.lower().removeprefix(".") not in known:
            raise ValueError(f"--plot must end in one of {', '.join(f'.{name}' for name in sorted(known))}, got {plot}")
    if "out" in arguments and Path(arguments.checkpoint).is_file() and not arguments.checkpoint.endswith(".json"):
        _check_file("--out", arguments.out)


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{option} must name a file, but {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} must name a file in a folder that exists, but {path.parent} does not")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{option} must name a file that can be written, but {path} cannot")
