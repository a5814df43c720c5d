"""SAP as pruning methods of torch.nn.utils.prune. They compute masks; all the rest is PyTorch's code.

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

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import check_dtype, check_whole
from torch_sap.decide.step import prune_step
from torch_sap.masks.mask import hooks_of
from torch_sap.masks.standardized import is_masked, is_standardized


class PQIMethod(prune.BasePruningMethod):
    """What the three methods share: the hyper-parameters, and the step on one tensor.

    Args:
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more.
        gamma: Factor on the prunable number ``d - r``; 0 or more.
        beta: The largest share of a group that is pruned at once, in [0, 1].

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if one of them is no number.
    """

    scope: ClassVar[Scope]

    def __init__(
        self, p: float = 0.5, q: float = 1.0, eta_r: float = 0.0, gamma: float = 1.0, beta: float = 0.9
    ) -> None:
        self.rule = Hyperparameters(p, q, eta_r, gamma, beta)

    def _row_dim(self, name: str, scores: Tensor) -> int:
        """The dimension of the rows."""
        return 0

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Mask for importance scores.

        Args:
            t: Scores, ranked by magnitude; real floating point, any shape.
            default_mask: Mask of the same shape from earlier prunings; entries where it is 0 do not count.

        Returns:
            New mask of the same shape and of default_mask's type: default_mask without what this method prunes.

        Raises:
            ValueError: if an unpruned score is NaN or infinite.
            TypeError: if the scores are not of a real floating-point type.
        """
        name = getattr(self, "_tensor_name", "t")
        check_dtype(t, name)
        check_whole(t, name)
        with torch.no_grad():
            dim = self._row_dim(name, t) if t.dim() else 0
            scores, unpruned = (
                each.movedim(dim, 0) if each.dim() else each for each in (t.detach(), default_mask != 0)
            )
            (mask,) = prune_step([Entry(name, scores, unpruned)], self.scope, self.rule).masks
            assert mask is not None
            return (default_mask * (mask.movedim(0, dim) if mask.dim() else mask)).contiguous()

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> prune.BasePruningMethod:
        """Prune a tensor of a module, as every method of torch.nn.utils.prune does.

        Args:
            module: Module that has the tensor.
            name: Name of the tensor, of a parameter of the module.
            args: Arguments of the class.
            importance_scores: Scores of the tensor's shape to use in place of its values.
            kwargs: Arguments of the class.

        Returns:
            The hook of the tensor: this method, or the PruningContainer that it was added to.

        Raises:
            ValueError: if an argument is out of its range, or if an unpruned score is NaN or infinite.
            TypeError: if the tensor is not of a real floating-point type.
            AssertionError: if the scores have another shape than the tensor.

        The module is as before if anything is raised. (PyTorch's own apply loses the earlier method's hook then.)
        Warns if the module standardizes its weight, behind which PyTorch's masks do not hold.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name must be the name of a parameter, got {name!r}")
        if importance_scores is not None and not isinstance(importance_scores, Tensor):
            raise TypeError(f"importance_scores must be a tensor or None, got {type(importance_scores).__name__}")
        if name == "weight" and is_standardized(module) and not is_masked(module):
            warnings.warn(
                f"{type(module).__name__} standardizes its weight, which makes other numbers of the zeros that "
                "PyTorch's masks leave; torch_sap.layer_unstructured([(module, 'weight')]) keeps them zeros",
                stacklevel=2,
            )
        with _unchanged_on_error(module, name):
            method: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
                module, name, *args, importance_scores=importance_scores, **kwargs
            )
            return method


class PQIGlobal(PQIMethod):
    """Prune the entries that it is given as one group.

    An "unstructured" method, so that ``torch.nn.utils.prune.global_unstructured`` can hand it the entries of many
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
    """Prune a tensor as one group, each tensor by its own sparsity.

    A "global" method in PyTorch's sense (it is given the whole tensor), which
    ``torch.nn.utils.prune.global_unstructured``
    refuses: it would make it a PQIGlobal. See :class:`PQIMethod` for arguments.
    """

    PRUNING_TYPE = "global"
    scope = "layer"


class PQINeuron(PQIMethod):
    """Prune each row (output channel) of a tensor as a group of its own.

    A "global" method in PyTorch's sense, as :class:`PQILayer` is. See :class:`PQIMethod` for the other arguments.

    Args:
        dim: Dimension of the output channels, as PyTorch's structured methods take it.
    """

    PRUNING_TYPE = "global"
    scope = "neuron"

    def __init__(
        self,
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        dim: int = 0,
    ) -> None:
        super().__init__(p, q, eta_r, gamma, beta)
        if not isinstance(dim, int):
            raise TypeError(f"dim must be an int, got dim={dim!r}")
        self.dim = dim

    def _row_dim(self, name: str, scores: Tensor) -> int:
        if scores.dim() < 2:
            raise ValueError(f"{name} must have more than one dimension to have rows, got shape {tuple(scores.shape)}")
        if not -scores.dim() <= self.dim < scores.dim():
            raise IndexError(f"dim must be a dimension of {name}, of shape {tuple(scores.shape)}, got dim={self.dim}")
        return self.dim


@contextmanager
def _unchanged_on_error(module: nn.Module, name: str) -> Iterator[None]:
    """Put a module's parameters, buffers and hooks back if an exception passes."""
    registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._forward_pre_hooks)  # type: ignore[assignment]
    before = [dict(registry) for registry in registries]
    value = module.__dict__.get(name)
    methods = {
        hook: hook._pruning_methods for hook in hooks_of(module, name) if isinstance(hook, prune.PruningContainer)
    }
    try:
        yield
    except BaseException:
        for registry, items in zip(registries, before, strict=True):
            registry.clear()
            registry.update(items)
        module.__dict__.pop(name, None)
        if value is not None:
            module.__dict__[name] = value
        for container, content in methods.items():
            container._pruning_methods = content
        raise
