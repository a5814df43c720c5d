"""Pruning that decides how much: the PQ Index and Sparsity-informed Adaptive Pruning for PyTorch.

Stopping rules are in :mod:`torch_sap.stopping`, frameworks in ``torch_sap.integrations``, and the result types in the
modules that make them.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023 (arXiv 2302.05601).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torch_sap.public import *  # noqa: F403
    from torch_sap.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Load the public names when one is first used: the command line can be interrupted while PyTorch loads."""
        if name == "__all__" or not name.startswith("__"):
            public = importlib.import_module("torch_sap.public")
            globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
