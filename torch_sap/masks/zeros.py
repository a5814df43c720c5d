"""Make pruned entries zero, in place, whenever somebody may have written to them. Nothing is inferred.

- Gradients are masked once per backward, all together, when the last one has been accumulated.
- Weights are restored after every step of a ``torch.optim`` optimizer that has them.
- The outermost forward restores the weights inside it (:mod:`torch_sap.masks.guards`), and loading restores them.

There is no record of what still is zero: a check that misses one kind of write would let a wrong model pass silently.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_sap.decide.keys import INTEGER_OF
from torch_sap.distributed.sharded import local, same_placement
from torch_sap.masks.small import SIZE, Changes, Pair, Small, restore_small_
from torch_sap.masks.zeros_cuda import store_zeros_

CHUNK = 2**20
"""Entries that are multiplied at once on the CPU, where PyTorch makes an integer copy of the mask first."""

_PLAIN = (Tensor, nn.Parameter)


def restore_zeros_(pairs: Iterable[Pair]) -> None:
    """Set the entries of tensors where a bool mask is False to +0.0, in place, replacing NaN and -0.0 too.

    The bits are multiplied as integers, all tensors in one call: on a CPU that is several times faster per entry than
    ``masked_fill_``. Autograd does not see it: version counters stay, so a forward may do this between another forward
    and its backward. Each process writes its parts of DTensors. On a GPU one kernel stores the zeros and reads only the
    masks (:mod:`torch_sap.masks.zeros_cuda`).
    """
    alike: dict[Any, list[Pair]] = defaultdict(list)
    on_gpu: list[Pair] = []
    others: list[Pair] = []
    try:
        for pair in pairs:
            tensor, mask = pair
            if type(tensor) not in _PLAIN:
                tensor, mask = pair = local(tensor), local(mask)
            if (shape := tensor.shape) != mask.shape:  # which could be broadcast
                raise RuntimeError(f"mask of shape {tuple(mask.shape)} for a tensor of shape {tuple(shape)}")
            if tensor.is_cpu:
                alike[shape, tensor.dtype].append(pair)
            elif tensor.is_cuda and type(tensor) in _PLAIN:  # one of a tracer has no address
                on_gpu.append(pair)
            else:
                others.append(pair)
        for (shape, _), group in alike.items():
            if shape.numel() > SIZE:
                others += group
            else:
                restore_small_(group)
        if others or on_gpu:
            _multiply_bits(others + (store_zeros_(on_gpu) if on_gpu else []))
    except (RuntimeError, KeyError):
        for keeper in list(_keepers.values()):  # somebody has changed a weight: name it
            keeper.check()
        raise


def _multiply_bits(pairs: Sequence[Pair]) -> None:
    bits: list[Tensor] = []
    masks: list[Tensor] = []
    for tensor, mask in pairs:
        of_tensor = tensor.data.view(INTEGER_OF[tensor.dtype])
        if tensor.numel() > CHUNK and tensor.is_cpu and (order := _shared_order(tensor, mask)) is not None:
            bits.extend(of_tensor.permute(order).view(-1).split(CHUNK))
            masks.extend(mask.permute(order).view(-1).split(CHUNK))
        else:
            bits.append(of_tensor)
            masks.append(mask)
    if bits:
        torch._foreach_mul_(bits, masks)


def _shared_order(tensor: Tensor, mask: Tensor) -> list[int] | None:
    """Dimension order in which both tensors are contiguous; None if there is none."""
    if tensor.is_contiguous() and mask.is_contiguous():
        return list(range(tensor.dim()))
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride()[dim], reverse=True)
    return order if all(t.permute(order).is_contiguous() for t in (tensor, mask)) else None


_keepers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The hooks of :mod:`torch_sap.masks.mask`, called keepers here: each knows a weight and its mask."""


def watch(keeper: Any) -> None:
    """Start restoring the zeros of a weight after optimizer steps."""
    _keepers[id(keeper)] = keeper
    forget()


def unwatch(keeper: Any) -> None:
    """Stop restoring them."""
    _keepers.pop(id(keeper), None)
    forget()


class Stepped(NamedTuple):
    """What a step of an optimizer has to restore: small tensors of its own, and those of other keepers."""

    parameters: list[int]
    small: Small
    others: list[Any]


_stepped: weakref.WeakKeyDictionary[Optimizer, Stepped] = weakref.WeakKeyDictionary()
_of_gradients: dict[tuple[MaskedGradient, ...], tuple[Small, list[MaskedGradient]] | None] = {}
"""By the gradients of a backward, in their order, the small ones and the others; None for those that came once."""

BACKWARDS = 2**6
"""Different backwards that are remembered."""


def forget(
    _: Any = None, *, changes: type[Changes] = Changes, known: Sequence[Any] = (_stepped, _of_gradients)
) -> None:
    """Look all keepers up anew: one has come or gone, or found another weight.

    The defaults stay when the interpreter ends and globals are None; a model may live longer.
    """
    changes.count += 1
    for each in known:
        each.clear()


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
    parameters = list(map(id, itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)))
    known = _stepped.get(optimizer)
    if known is not None and known.parameters == parameters and known.small.restore(known.small.weights):
        for keeper in known.small.keepers:
            keeper.covered = False
        if known.others:
            _restore_stepped(known.others, set(parameters))
        return
    keepers, stepped = list(_keepers.values()), set(parameters)
    _restore_stepped(keepers, stepped)
    small = Small(keeper for keeper in keepers if id(keeper.weight) in stepped)
    done = set(small.keepers)
    others = [each for each in keepers if each not in done and (each.sharded or id(each.weight) in stepped)]
    _stepped[optimizer] = Stepped(parameters, small, others)


def _restore_stepped(keepers: Iterable[Any], stepped: set[int]) -> None:
    pairs = []
    for keeper in keepers:
        if (found := keeper.find()) is None:
            continue
        keeper.covered = False  # left by a forward that KeyboardInterrupt has ended
        weight, mask = found
        if id(weight) in stepped:
            keeper.copied_from = None  # the copy is trained
        if keeper.sharded:
            if keeper.weight is not None and id(keeper.weight) in stepped:
                weight = keeper.weight  # the sharded Parameter, while FSDP has put the gathered one in its place
            if not same_placement(weight, mask):
                continue
        if id(weight) in stepped:
            pairs.append((weight, mask))
    restore_zeros_(pairs)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)

_arrived: dict[int, list[MaskedGradient]] = {}
"""By backward, the weights whose gradients it has accumulated. A backward that fails leaves its list, which holds no
tensor; a task's number is never used again."""

_queue_callback: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
_current_task: Callable[[], int] = torch._C._current_graph_task_id


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
        task = _current_task()
        if task == -1:
            _mask_one_by_one([self])
            return
        if (arrived := _arrived.get(task)) is not None:
            arrived.append(self)
            return
        if _in_compiled_backward():
            torch.compiler.disable(_mask_one_by_one)([self])
            return
        new: list[MaskedGradient] = []
        arrived = _arrived.setdefault(task, new)  # several threads may work for one backward
        arrived.append(self)
        if arrived is new:
            _queue_callback(lambda: _queue_callback(lambda: _mask_gradients(_arrived.pop(task, []))))


def _in_compiled_backward() -> bool:
    """Whether this backward runs in a graph of compiled autograd, which forgets the callbacks that are queued in it."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def _mask_gradients(arrived: Sequence[MaskedGradient]) -> None:
    key = tuple(arrived)
    if (known := _of_gradients.get(key)) is not None:
        small, others = known
        if small.restore([weight.grad for weight in small.weights]):
            _mask_one_by_one(others)
            return
    _mask_one_by_one(arrived)
    if key in _of_gradients:
        small = Small(keeper for hook in arrived if (keeper := hook.keeper()) is not None)
        done = set(small.keepers)
        _of_gradients[key] = small, [hook for hook in arrived if hook.keeper() not in done]
    else:
        if len(_of_gradients) >= BACKWARDS:
            _of_gradients.clear()
        _of_gradients[key] = None


def _mask_one_by_one(arrived: Iterable[MaskedGradient]) -> None:
    pairs = []
    for hook in arrived:
        keeper = hook.keeper()
        if keeper is None:
            raise hook.lost()
        if (found := keeper.find()) is None:
            if keeper.module is None:
                raise hook.lost()
            continue
        if (weight := keeper.weight) is None or (gradient := weight.grad) is None:
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
