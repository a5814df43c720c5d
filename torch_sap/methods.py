"""SAP as pruning methods of torch.nn.utils.prune: they compute masks, and PyTorch's code does the rest.

Source: Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_sap.arguments import check_int
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import check_dtype, check_whole
from torch_sap.decide.step import prune_step
from torch_sap.masks.mask import hooks_of
from torch_sap.masks.plain import save_plainly
from torch_sap.masks.standardized import is_masked, is_standardized


class PQIMethod(prune.BasePruningMethod):
    """Base of the three methods. p, q, eta_r, gamma, beta are those of :func:`torch_sap.global_unstructured`."""

    scope: ClassVar[Scope]

    def __init__(
        self, p: float = 0.5, q: float = 1.0, eta_r: float = 0.0, gamma: float = 1.0, beta: float = 0.9
    ) -> None:
        self.rule = Hyperparameters(p, q, eta_r, gamma, beta)
        save_plainly()

    def _row_dim(self, name: str, scores: Tensor) -> int:
        return 0

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Compute a mask from importance scores of any shape, ranked by magnitude.

        Returns:
            default_mask (entries where it is 0 do not count) without the entries that this method prunes, in its type.

        Raises:
            ValueError: if an unpruned score is NaN or infinite.
            TypeError: if the scores do not have a real floating-point type.
        """
        name = getattr(self, "_tensor_name", "t")
        check_dtype(t, name)
        check_whole(t, name)
        with torch.no_grad():
            dim = self._row_dim(name, t) if t.dim() else 0

            def move(tensor: Tensor, source: int, to: int) -> Tensor:
                return tensor.movedim(source, to) if tensor.dim() else tensor

            entry = Entry(name, move(t.detach(), dim, 0), move(default_mask != 0, dim, 0))
            (mask,) = prune_step([entry], self.scope, self.rule).masks
            assert mask is not None
            return (default_mask * move(mask, 0, dim)).contiguous()

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> prune.BasePruningMethod:
        """Prune a tensor of a module, as every method of torch.nn.utils.prune does.

        Warns if the module standardizes its weight, because PyTorch's masks do not hold behind that. Scores of the
        tensor's shape replace its values; the other arguments are p, q, eta_r, gamma, beta, and dim for PQINeuron.

        Returns:
            The hook of the tensor: this method, or the PruningContainer that it was added to.

        Raises:
            ValueError: if an argument is out of range, or an unpruned score is NaN or infinite.
            TypeError: if the tensor does not have a real floating-point type.
            AssertionError: if the scores have another shape than the tensor.
                The module is as before if anything is raised. (PyTorch's own apply loses the earlier method's hook.)
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name must be the name of a parameter, got {name!r}")
        if importance_scores is not None and not isinstance(importance_scores, Tensor):
            raise TypeError(f"importance_scores must be a tensor or None, got {type(importance_scores).__name__}")
        if name == "weight" and is_standardized(module) and not is_masked(module):
            warnings.warn(
                f"{type(module).__name__} standardizes its weight, which turns the zeros of PyTorch's masks into other "
                "numbers; torch_sap.layer_unstructured([(module, 'weight')]) keeps them zeros",
                stacklevel=2,
            )
        with _unchanged_on_error(module, name):
            method: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
                module, name, *args, importance_scores=importance_scores, **kwargs
            )
            return method


class PQIGlobal(PQIMethod):
    """Prune all given entries as one group.

    An "unstructured" method, so that ``torch.nn.utils.prune.global_unstructured`` can give it the entries of many
    tensors: ``prune.global_unstructured(parameters, pruning_method=PQIGlobal, p=0.5, q=1.0)``. See :class:`PQIMethod`
    for arguments.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 1.0], [0.0, 0.0]]))
        >>> _ = PQIGlobal.apply(layer, "weight")
        >>> layer.weight_mask
        tensor([[1., 1.],
                [0., 0.]])
    """

    PRUNING_TYPE = "unstructured"
    scope = "global"


class PQILayer(PQIMethod):
    """Prune a tensor as one group.

    A "global" method in PyTorch's sense (it needs the whole tensor), so ``torch.nn.utils.prune.global_unstructured``
    refuses it. See :class:`PQIMethod` for arguments.
    """

    PRUNING_TYPE = "global"
    scope = "layer"


class PQINeuron(PQIMethod):
    """Prune each row (output channel) of a tensor as a group.

    A "global" method in PyTorch's sense, like :class:`PQILayer`. See :class:`PQIMethod` for the other arguments.

    Args:
        dim: Dimension of the output channels, as PyTorch's structured methods take it.

    Raises:
        IndexError: by ``apply``, if the tensor lacks that dimension; a ValueError if it has only one.
    """

    PRUNING_TYPE = "global"
    scope = "neuron"

    def __init__(
        self, p: float = 0.5, q: float = 1.0, eta_r: float = 0.0, gamma: float = 1.0, beta: float = 0.9, dim: int = 0
    ) -> None:
        super().__init__(p, q, eta_r, gamma, beta)
        check_int("dim", dim)
        self.dim = dim

    def _row_dim(self, name: str, scores: Tensor) -> int:
        if scores.dim() < 2:
            raise ValueError(f"{name} must have more than one dimension to have rows, got shape {tuple(scores.shape)}")
        if not -scores.dim() <= self.dim < scores.dim():
            raise IndexError(f"dim must be a dimension of {name}, of shape {tuple(scores.shape)}, got dim={self.dim}")
        return self.dim


@contextmanager
def _unchanged_on_error(module: nn.Module, name: str) -> Iterator[None]:
    """Restore a module's attributes, parameters, buffers and hooks if an exception passes."""
    registries: Any = (vars(module), module._parameters, module._buffers, module._forward_pre_hooks)
    before = [dict(registry) for registry in registries]
    methods = {hook: hook._pruning_methods for hook in hooks_of(module, name) if hasattr(hook, "_pruning_methods")}
    try:
        yield
    except BaseException:
        for registry, items in zip(registries, before, strict=True):
            registry.clear()
            registry.update(items)
        for container, content in methods.items():
            container._pruning_methods = content
        raise
