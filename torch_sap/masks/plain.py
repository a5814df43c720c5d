"""Hand out plain state_dicts of a pruned model: what :func:`torch_sap.remove` would leave, while the masks stay.

Inside :func:`plain_state_dicts` every ``state_dict()`` of the model, and of any module in it, has plain keys and
values. :func:`dense_state_dict` is one such call. The ``save_pretrained`` methods of other libraries run inside it,
because their ``from_pretrained`` would silently leave out keys of PyTorch's pruning, and start from random weights.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_sap.arguments import check_model
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import place
from torch_sap.masks.parameters import has_mask
from torch_sap.masks.standardized import centered, is_masked
from torch_sap.masks.zeros import restore_zeros_

WRITERS = (
    ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained"),
    ("peft.peft_model", "PeftModel", "save_pretrained"),
    ("peft.peft_model", "PeftModel", "load_adapter"),  # which asks the model's state_dict for names in the file
    ("diffusers.models.modeling_utils", "ModelMixin", "save_pretrained"),
    ("huggingface_hub.hub_mixin", "ModelHubMixin", "save_pretrained"),
    ("sentence_transformers", "SentenceTransformer", "save_pretrained"),
)
"""The methods, with their modules and classes, of files that a ``from_pretrained`` reads into the dense model."""


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state_dict that :func:`remove` would leave, without changing the model.

    The keys are those from before the pruning (in the same order, unless PyTorch's methods moved them), and pruned
    entries are +0.0, whatever was written there. It is for other programs: ``torch.save``, ``save_pretrained(path,
    state_dict=...)``, ``torch.distributed.checkpoint``. Tensors share memory with the model as in
    ``model.state_dict()``, and with each other where the model's do. Only those that PyTorch's methods pruned, and
    those of standardized convolutions, are copies.

    Args:
        model: Any module, pruned or not. Of DistributedDataParallel, DataParallel, and torch.compile it is the
            module inside. With FSDP2, the tensors are DTensors.

    Returns:
        A dict from names to tensors, with everything else that ``model.state_dict()`` holds.

    Raises:
        TypeError: if the model is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = global_unstructured(model)
        >>> list(model.state_dict()), list(dense_state_dict(model))
        (['0.weight_orig', '0.bias', '0.weight_mask'], ['0.weight', '0.bias'])
    """
    check_model(model)
    compiled: Any = sys.modules.get("torch._dynamo.eval_frame")
    inner = unwrap(model)
    while isinstance(inner, nn.DataParallel) or (compiled and isinstance(inner, compiled.OptimizedModule)):
        inner = unwrap(inner.module if isinstance(inner, nn.DataParallel) else inner._orig_mod)
    with plain_state_dicts(inner):
        return inner.state_dict()


@contextmanager
def plain_state_dicts(model: nn.Module) -> Iterator[None]:
    """Let ``state_dict()`` of the model and of modules in it return plain keys and values, in this thread."""
    with torch.no_grad():
        reshard(model.modules())
    plain = _Plain(model)
    before = [(module, module.__dict__.get("_save_to_state_dict")) for module in plain.modules]
    try:
        for module in plain.modules:
            module.__dict__["_save_to_state_dict"] = functools.partial(plain.save, module, module._save_to_state_dict)
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("_save_to_state_dict", None)
            if own is not None:
                module.__dict__["_save_to_state_dict"] = own


class _Plain:
    """The plain values of the pruned parameters of a model, each computed when it is first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._thread = threading.get_ident()
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        self._values: dict[int, Tensor] = {}
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for key, parameter in module._parameters.items():
                self._paths.setdefault(id(parameter), []).append(f"{path}.{key}".removeprefix("."))
            for name in _pruned_names(module):
                self._holders.setdefault(id(module._parameters[name + "_orig"]), []).append((module, name))
        self.modules = [m for m in model.modules() if any(id(p) in self._holders for p in m._parameters.values())]

    def save(
        self,
        module: nn.Module,
        original: Callable[..., None],
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,
    ) -> None:
        """``_save_to_state_dict`` of a module with a pruned parameter, or one that is pruned in another module."""
        if threading.get_ident() != self._thread:
            original(destination, prefix, keep_vars)
            return
        own: OrderedDict[str, Any] = OrderedDict()
        original(own, prefix, keep_vars)
        pruned = _pruned_names(module)
        dropped = {f"{prefix}{name}_mask" for name in pruned}
        names = {f"{prefix}{name}_orig": prefix + name for name in pruned}
        parameters = {prefix + key: parameter for key, parameter in module._parameters.items()}
        for key, value in own.items():
            if key not in dropped:
                parameter = parameters.get(key)
                plain = None if parameter is None else self._value(parameter)
                destination[names.get(key, key)] = value if plain is None or plain is parameter else plain

    def _value(self, weight: nn.Parameter) -> Tensor | None:
        """The Parameter itself if its own entries have been made zeros, another tensor, or None if it is not pruned."""
        holders = self._holders.get(id(weight))
        if holders is None:
            return None
        if id(weight) not in self._values:
            value: Tensor = weight
            for module, name in holders:
                value = _masked(module, name, weight, value)
            if value is not weight:
                self._check_alike(weight, holders)
            self._values[id(weight)] = value
        return self._values[id(weight)]

    def _check_alike(self, weight: nn.Parameter, holders: list[tuple[nn.Module, str]]) -> None:
        """Warn if modules that share a weight mask it differently: a plain state_dict has one tensor for all."""
        paths = self._paths[id(weight)]
        masks = [module._buffers[name + "_mask"] for module, name in holders]
        if len(paths) > len(holders) or any(not torch.equal(mask != 0, masks[0] != 0) for mask in masks[1:]):  # type: ignore[arg-type]
            warnings.warn(
                f"{' and '.join(paths)} are one parameter, but PyTorch's masks prune it differently in each; the plain "
                "state_dict has it pruned everywhere, as torch_sap.remove leaves it. Prune it by a function of "
                "torch_sap, which masks shared weights everywhere",
                stacklevel=2,
            )


def _pruned_names(module: nn.Module) -> list[str]:
    names = [key.removesuffix("_orig") for key, parameter in module._parameters.items() if parameter is not None]
    return [name for name in names if has_mask(module, name)]


def _masked(module: nn.Module, name: str, weight: Tensor, value: Tensor) -> Tensor:
    """A value of a weight, masked as a module masks it; in place if the module holds it so, and else a copy."""
    mask = module._buffers[name + "_mask"]
    assert mask is not None
    mask = place(mask, like=weight)
    if name == "weight" and is_masked(module):
        return centered(value.detach().double(), mask).to(weight.dtype)
    if value is weight and module.__dict__.get(name) is weight and mask.dtype is torch.bool:
        restore_zeros_([(weight, mask)])
        return value
    return (value.detach() * mask.to(weight.dtype)).masked_fill(mask == 0, 0)


def _plain_given(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict that somebody made of a module before, with plain keys and values."""
    stems = [key.removesuffix("_orig") for key in state if key.endswith("_orig")]
    pruned = {stem for stem in stems if stem + "_mask" in state}
    dropped = {stem + "_mask" for stem in pruned}
    modules = dict(module.named_modules())
    plain: dict[str, Any] = {}
    for key, value in state.items():
        stem = key.removesuffix("_orig")
        if key in dropped:
            continue
        if stem == key or stem not in pruned:
            plain[key] = value
            continue
        mask = place(state[stem + "_mask"].to(value.device), like=value)
        path, _, name = stem.rpartition(".")
        if name == "weight" and path in modules and is_masked(modules[path]):
            plain[stem] = centered(value.double(), mask).to(value.dtype)
        else:
            masked = (value * mask.to(value.dtype)).masked_fill(mask == 0, 0)
            plain[stem] = value if torch.equal(masked, value) else masked  # tied weights stay one tensor
    return plain


def save_plainly() -> None:
    """Let every ``save_pretrained`` of the libraries that are imported by now write plain weights."""
    for library, kind, name in WRITERS:
        writer = getattr(sys.modules.get(library), kind, None)
        method = getattr(writer, name, None)
        if method is not None and not hasattr(method, "sees_plain_weights"):
            setattr(writer, name, _plainly(method))


def _plainly(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def plainly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Module) or not any(map(_pruned_names, self.modules())):
            return method(self, *args, **kwargs)
        args = tuple(_plain_given(self, given) if isinstance(given, Mapping) else given for given in args)
        if isinstance(given := kwargs.get("state_dict"), Mapping):
            kwargs["state_dict"] = _plain_given(self, given)
        with plain_state_dicts(self):
            return method(self, *args, **kwargs)

    plainly.sees_plain_weights = True  # type: ignore[attr-defined]
    return plainly
