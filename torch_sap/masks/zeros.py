"""Make pruned entries zero, in place, whenever somebody may have written to them. Nothing is inferred.

- Gradients are masked once per backward, all together, when the last one has been accumulated.
- Weights are restored after every step of a ``torch.optim`` optimizer that has them.
- The outermost forward restores the weights inside it (:mod:`torch_sap.masks.guards`), and loading restores them.

There is no record of what still is zero: a check that misses one kind of write would let a wrong model pass silently.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_sap.decide.keys import INTEGER_OF
from torch_sap.distributed.sharded import local, same_placement
from torch_sap.masks.zeros_cuda import store_zeros_

CHUNK = 2**20
"""Entries that are multiplied at once on the CPU, where PyTorch makes an integer copy of the mask first."""

SMALL = 2**9
"""Entries of a CPU tensor up to which one call takes less time than views, a conversion of the mask, and a product."""

_ZEROS = {dtype: torch.zeros((), dtype=dtype) for dtype in INTEGER_OF}

Pair = tuple[Tensor, Tensor]
"""A tensor and its bool mask."""

_PLAIN = (Tensor, nn.Parameter)


def restore_zeros_(pairs: Iterable[Pair]) -> None:
    """Set the entries of tensors where a bool mask is False to +0.0, in place, replacing NaN and -0.0 too.

    The bits are multiplied as integers, all tensors in one call: on a CPU that is several times faster per entry than
    ``masked_fill_``. Autograd does not see it: version counters stay, so a forward may do this between another forward
    and its backward. Each process writes its parts of DTensors. On a GPU one kernel stores the zeros and reads only the
    masks (:mod:`torch_sap.masks.zeros_cuda`).
    """
    bits: list[Tensor] = []
    masks: list[Tensor] = []
    on_gpu: list[Pair] = []
    try:
        for tensor, mask in pairs:
            if type(tensor) not in _PLAIN:
                tensor, mask = local(tensor), local(mask)
            if (size := tensor.numel()) != mask.numel():  # which could be broadcast
                raise RuntimeError(f"mask of shape {tuple(mask.shape)} for a tensor of shape {tuple(tensor.shape)}")
            if tensor.is_cuda and type(tensor) in _PLAIN:  # one of a tracer has no address
                on_gpu.append((tensor, mask))
            elif size <= SMALL and tensor.is_cpu:
                torch.where(mask, data := tensor.data, _ZEROS[tensor.dtype], out=data)
            elif size > CHUNK and tensor.is_cpu and (order := _shared_order(tensor, mask)) is not None:
                bits.extend(tensor.data.view(INTEGER_OF[tensor.dtype]).permute(order).view(-1).split(CHUNK))
                masks.extend(mask.permute(order).view(-1).split(CHUNK))
            else:
                bits.append(tensor.data.view(INTEGER_OF[tensor.dtype]))
                masks.append(mask)
        for tensor, mask in store_zeros_(on_gpu) if on_gpu else ():
            bits.append(tensor.data.view(INTEGER_OF[tensor.dtype]))
            masks.append(mask)
        if bits:
            torch._foreach_mul_(bits, masks)
    except (RuntimeError, KeyError):
        for keeper in list(_keepers.values()):  # somebody has changed a weight: name it
            keeper.check()
        raise


def _shared_order(tensor: Tensor, mask: Tensor) -> list[int] | None:
    """Dimension order in which both tensors are contiguous; None if there is none."""
    if tensor.shape != mask.shape:
        return None
    if tensor.is_contiguous() and mask.is_contiguous():
        return list(range(tensor.dim()))
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride()[dim], reverse=True)
    return order if all(t.permute(order).is_contiguous() for t in (tensor, mask)) else None


_keepers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The hooks of :mod:`torch_sap.masks.mask`, called keepers here: each knows a weight and its mask."""


def watch(keeper: Any) -> None:
    """Start restoring the zeros of a weight after optimizer steps."""
    _keepers[id(keeper)] = keeper


def unwatch(keeper: Any) -> None:
    """Stop restoring them."""
    _keepers.pop(id(keeper), None)


_small_eps: weakref.WeakKeyDictionary[Optimizer, list[tuple[dict[str, Any], float]]] = weakref.WeakKeyDictionary()
"""Per optimizer in a step, the groups whose ``eps`` was raised, and its former value."""


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise an ``eps`` that its parameters' type rounds to 0 to the smallest number of the type, for this step.

    Adam and its like divide by ``sqrt(v) + eps``. A pruned network has many entries without a gradient, also unpruned
    ones that feed a neuron nobody reads, and 0 / 0 would make them NaN. Where v is not 0 this changes nothing.
    """
    if not _keepers:
        return
    _lower_eps(optimizer)  # of a step that failed
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps >= 2**-24:  # the smallest number of float16
            continue
        types = {parameter.dtype for parameter in group["params"]}
        if len(types) == 1 and (dtype := types.pop()).is_floating_point:
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            if eps <= smallest / 2:
                _small_eps.setdefault(optimizer, []).append((group, eps))
                group["eps"] = smallest


def _lower_eps(optimizer: Optimizer) -> None:
    for group, eps in _small_eps.pop(optimizer, ()):
        group["eps"] = eps


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _keepers:
        return
    _lower_eps(optimizer)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = []
    for reference in _keepers.valuerefs():
        keeper = reference()
        if keeper is None or (found := keeper.find()) is None:
            continue
        keeper.covered = False  # left by a forward that KeyboardInterrupt has ended
        weight, mask = found
        if id(weight) in stepped:
            keeper.copied_from = None  # the copy is trained
        if keeper.sharded and keeper.weight is not None and id(keeper.weight) in stepped:
            weight = keeper.weight  # the sharded Parameter, while FSDP has put the gathered one in its place
        if id(weight) in stepped and (not keeper.sharded or same_placement(weight, mask)):
            pairs.append((weight, mask))
    restore_zeros_(pairs)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)

_arrived: dict[int, list[MaskedGradient]] = {}
"""By backward, the weights whose gradients it has accumulated. A backward that fails leaves its list, which holds no
tensor; a task's number is never used again."""

_queue_callback: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback


MARK = "_torch_sap_mark"
"""Attribute of a Parameter whose gradients are masked, a number. ``torch.utils.swap_tensors`` swaps the attributes of
two tensors, and the hooks of their gradients without the dict in which they are registered."""

_marks = itertools.count()


def renew_hooks(weight: Any) -> None:
    """Register the hooks of a Parameter's gradient again, after swap_tensors."""
    if weight._post_accumulate_grad_hooks is not None:
        weight._post_accumulate_grad_hooks = OrderedDict(weight._post_accumulate_grad_hooks)


class MaskedGradient:
    """Masks the gradient of a Parameter after each backward that accumulates into it.

    The Parameter holds this object, which holds the keeper weakly.
    """

    def __init__(self, weight: Any, keeper: Any) -> None:
        self.keeper, self.lost = weakref.ref(keeper), partial(type(keeper).lost, keeper.path)
        self.handle = weight.register_post_accumulate_grad_hook(self.accumulated)
        weight.__dict__.setdefault(MARK, next(_marks))

    def accumulated(self, weight: Tensor) -> None:
        """Note that a gradient has arrived; the first one of a backward asks for the callback at its end.

        The callback queues itself once more, so that it comes after that of DistributedDataParallel, which copies
        reduced gradients back.
        """
        task = torch._C._current_graph_task_id()
        if task == -1:
            _mask_gradients([self])
            return
        if (arrived := _arrived.get(task)) is not None:
            arrived.append(self)
            return
        new: list[MaskedGradient] = []
        arrived = _arrived.setdefault(task, new)  # several threads may work for one backward
        arrived.append(self)
        if arrived is new:
            _queue_callback(lambda: _queue_callback(lambda: _mask_gradients(_arrived.pop(task, []))))


def _mask_gradients(arrived: Iterable[MaskedGradient]) -> None:
    pairs = []
    for hook in arrived:
        keeper = hook.keeper()
        if keeper is None or keeper.is_orphan:
            raise hook.lost()
        if (weight := keeper.weight) is None or (gradient := weight.grad) is None:
            continue
        if (found := keeper.find()) is None:
            continue
        mask = found[1]
        if gradient.is_sparse or (keeper.sharded and not same_placement(gradient, mask)):
            with torch.no_grad():
                weight.grad = gradient * mask.to(gradient.dtype)
        else:
            pairs.append((gradient, mask))
    restore_zeros_(pairs)


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise unless this is an optimizer of the model, or None.

    Raises:
        TypeError: if it is not an optimizer.
        ValueError: if it holds no parameter of the model.
    """
    if optimizer is None:
        return
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = set(map(id, model.parameters()))
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizer must hold parameters of the model, but holds none of them: make it from model.parameters()"
        )
