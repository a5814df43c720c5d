"""Run an example through a model, and leave the model exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_sap.arguments import check_model
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.masks.parameters import Prunable, resolve


def whole_weights(model: nn.Module, caller: str) -> list[Prunable]:
    """List the prunable and the pruned tensors of a model; a NotImplementedError names one that is sharded."""
    check_model(model)
    prunables = resolve(model, masked=True).prunables
    if sharded := next((prunable.name for prunable in prunables if is_dtensor(prunable.weight)), None):
        raise NotImplementedError(
            f"{sharded} is sharded (a DTensor), but {caller} needs whole weights; load the full state_dict into a "
            f"model on one process and call {caller} there"
        )
    return prunables


def arguments_of(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Split an example (a tensor, a tuple, or a dict) into positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def tensors_of(example: Any) -> list[Tensor]:
    """List the tensors in an example or an output."""
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and afterwards restore modes, attributes, buffers, and random number generators.

    Inference mode is off inside: in it a linear layer is one operation, of which neither MACs nor gradients are known.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]  # not in vars() of TorchScript modules
    attributes = [dict(vars(module)) for module in modules]
    buffers = [{name: (b, None if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    accelerators = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
    kind = accelerators[0].type if accelerators else "cuda"
    indices = [device.index for device in accelerators]
    with torch.inference_mode(False), torch.random.fork_rng(indices, device_type=kind):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode, own, held in zip(modules, modes, attributes, buffers, strict=True):
                vars(module).clear()
                vars(module).update(own)
                module.training = mode
                for name in [
                    name for name, _ in module._buffers.items() if name not in held
                ]:  # TorchScript's has items only
                    del module._buffers[name]
                for name, (buffer, before) in held.items():
                    module._buffers[name] = buffer
                    if buffer is not None and before is not None and not torch.equal(buffer, before):
                        buffer.copy_(before)
