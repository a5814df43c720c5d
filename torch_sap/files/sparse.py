"""Save pruned models as small safetensors files, with the remaining values and one bit per weight, and load them.

The tensors of a pruned weight are named and laid out as in compressed-tensors' format "sparse-bitmask"
(:mod:`torch_sap.files.bitmask`); docs/ship.md describes the file to the byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_sap.arguments import check_choice, check_model, check_path
from torch_sap.decide.keys import INTEGER_OF, check_dtype, count_true
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.files.atomic import replacing
from torch_sap.files.bitmask import gather_values, matrix_shape, not_zero, pack, row_offsets, scatter_values, unpack
from torch_sap.masks.guards import guard
from torch_sap.masks.mask import hold_masks
from torch_sap.masks.parameters import Pair, Prunable

PathLike = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)
What = Literal["model", "masks"]

FORMAT = 1
"""Version of the description in a file. A file with another number is refused."""

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def save_sparse(model: nn.Module, path: PathLike, *, what: What = "model") -> None:
    """Save a model as the values that pruning left and one bit per weight, bit for bit, in a safetensors file.

    A pruned tensor takes its remaining values, one bit per entry and 8 bytes per row. A weight without a mask, as
    :func:`remove` leaves it, is stored in the same way where that is smaller, with bits for what is not zero.
    Everything else in the state_dict is stored as it is, shared tensors once. The file is written under another name
    and renamed when it is complete.

    Args:
        model: Any module, pruned or not; it is not changed. Of tensors pruned by PyTorch's methods, the values behind
            the mask (``weight_orig`` where ``weight_mask`` is 0) are not kept.
        path: File to write, usually ``.safetensors``.
        what: "model", or "masks" for the masks alone.

    Raises:
        TypeError: if model is not a module, or its state_dict holds anything but parameters and buffers, or one of a
            type that safetensors cannot hold.
        ValueError: if a tensor has no values, two would have the same name in the file, or there is no mask to save.
        NotImplementedError: if a tensor is sharded.
        ImportError: if safetensors is not installed (extra "safetensors").

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = global_unstructured(model)
        >>> save_sparse(model, "sparse.safetensors")
        >>> again = load_sparse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "sparse.safetensors")
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    check_model(model)
    check_path("path", path)
    check_choice("what", what, get_args(What))
    everything = _held_tensors(model, "save_sparse")
    about: dict[str, Any] = {"format": FORMAT, "kind": what, "tensors": {}}
    about["shared"] = {alias: held.name for held in everything for alias in held.aliases}
    pieces: list[tuple[str, Tensor]] = []
    for held in everything:
        masked, kept = _kept(held)
        if kept is not None and (masked or what == "model"):
            prefix = held.name.removesuffix(".weight")  # as compressed-tensors has it
            found = {"shape": list(kept.shape), "remaining": int(count_true(kept)), "masked": masked}
            about["tensors"][held.name] = {"prefix": prefix, **found}
            bits, offsets = pack(kept)
            pieces += [(f"{prefix}.bitmask", bits), (f"{prefix}.shape", torch.tensor(matrix_shape(kept.shape)))]
            if what == "model":
                values = gather_values(held.tensor.detach().cpu(), kept)
                pieces += [(f"{prefix}.row_offsets", offsets), (f"{prefix}.compressed", values)]
        elif what == "model":
            pieces.append((held.name, held.tensor.detach().cpu()))
    if what == "masks" and not pieces:
        raise ValueError("model must have masks to save, but no tensor of it is pruned; prune it first")
    _write(path, pieces, {"format": "pt", "torch_sap": json.dumps(about)})


def load_sparse(model: Model, path: PathLike, *, what: What = "model") -> Model:
    """Load a file of :func:`save_sparse` into a model of the same architecture, in place, bit for bit.

    Tensors that had a mask get it: the model is then pruned as the saved one was, whether it was dense or pruned
    before, and can be trained and pruned on. Everything is checked (names, shapes, types, counts) and unpacked before
    the first value is written. A "sparse-bitmask" file of compressed-tensors can be loaded too.

    Args:
        model: The module to load into.
        path: The file.
        what: "model", or "masks" to give the model the masks alone. Then exactly those entries are pruned that are
            pruned in the file; the others keep their values, and an entry that was pruned before is 0.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: if there is no file.
        ImportError: if safetensors is not installed (extra "safetensors").
        ValueError: if the file is truncated or inconsistent, or does not fit the model; the tensor is named.
        TypeError, NotImplementedError: as in :func:`save_sparse`.
            The model is as before if anything is raised.
    """
    check_model(model)
    check_path("path", path)
    check_choice("what", what, get_args(What))
    everything = _held_tensors(model, "load_sparse")
    pairs = _pair(everything, _read(path, what), path, what)
    masks = {}
    for held, there in pairs:
        _check_fit(held, there, path)
        if there.mask is not None:
            masks[held.name] = there.mask.reshape(held.tensor.shape).to(held.tensor.device)
    changed = [(held.prunable, masks.get(held.name)) for held in everything if held.prunable is not None]
    changed = [(one, mask) for one, mask in changed if mask is not None or one.mask is not None]
    values = [(held.tensor, there.value) for held, there in pairs if there.value is not None and what == "model"]

    def change() -> None:
        hold_masks([one for one, _ in changed], [mask for _, mask in changed])
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value.reshape(tensor.shape))
        guard(model)

    _finish(change)
    return model


def _finish(change: Callable[[], None]) -> None:
    """Make a change that can be repeated; if it is interrupted, finish it and raise again."""
    try:
        change()
    except BaseException:
        change()
        raise


class _Held(NamedTuple):
    """One parameter (with its mask) or buffer of a model, and its keys in the state_dict of the dense model."""

    name: str
    aliases: list[str]
    tensor: Tensor
    prunable: Prunable | None


def _held_tensors(model: nn.Module, function: str) -> list[_Held]:
    """The parameters and buffers of a state_dict in its order, each once, without masks."""
    model = unwrap(model)
    holders: dict[int, list[Pair]] = {}
    masks, pruned = set(), set()
    for module in model.modules():
        for now, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = now.removesuffix("_orig")
            if name != now and (mask := module._buffers.get(f"{name}_mask")) is not None:
                masks.add(id(mask))
                pruned.add(id(parameter))
            else:
                name = now
            holders.setdefault(id(parameter), []).append((module, name))
    buffers = {id(buffer) for buffer in model.buffers()}
    found: dict[int, _Held] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in masks:
            continue
        if id(tensor) not in holders and id(tensor) not in buffers:
            raise TypeError(
                f"{function} needs a state_dict of parameters and buffers, but {key} is a {type(tensor).__name__} that "
                "is neither; keep it apart"
            )
        key = key.removesuffix("_orig") if id(tensor) in pruned else key
        if is_dtensor(tensor):
            raise NotImplementedError(
                f"{key} is sharded (a DTensor), which {function} cannot handle; use a model on one process with the "
                "full state_dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True)"
            )
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(f"{key} must have values, but it is on the meta device or not initialized yet")
        if id(tensor) in found:
            found[id(tensor)].aliases.append(key)
        else:
            places = holders.get(id(tensor))
            found[id(tensor)] = _Held(key, [], tensor, None if places is None else Prunable(key, tuple(places)))
    return list(found.values())


def _kept(held: _Held) -> tuple[bool, Tensor | None]:
    """Whether a tensor has a mask, and which of its entries are stored, on the CPU; None stores it as it is."""
    tensor = held.tensor.detach()
    if held.prunable is not None and (mask := held.prunable.mask) is not None:
        check_dtype(tensor, held.name)
        return True, mask.cpu()
    if held.prunable is None or tensor.dtype not in INTEGER_OF or tensor.dim() < 2:
        return False, None
    kept = not_zero(tensor.cpu())
    rows, columns = matrix_shape(kept.shape)
    packed = int(count_true(kept)) * tensor.itemsize + rows * (-(-columns // 8) + 8) + 16
    return False, kept if packed < tensor.nbytes else None


def _write(path: PathLike, pieces: list[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_sparse needs safetensors: pip install 'torch_sap[safetensors]'") from error
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in pieces:
        if name in tensors:
            raise ValueError(f"tensors must have different names in a file, but two would be called {name!r}")
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:  # safetensors refuses shared memory
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        tensors[name] = tensor.contiguous()
    with replacing(path) as (temporary,):
        mode = os.stat(temporary).st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)} could not be written: {error}") from error
        except KeyError as error:  # safetensors has no name for a type
            kind = error.args[0]
            name = next((name for name, tensor in tensors.items() if str(tensor.dtype) == str(kind)), "a tensor")
            raise TypeError(f"{name} must be of a type that safetensors can hold, got {kind}") from None
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read


class _Stored(NamedTuple):
    """One tensor of a file: its value (None in a file of masks), its mask (None if it has none), its true shape."""

    name: str
    value: Tensor | None
    mask: Tensor | None
    shape: tuple[int, ...]


def _read(path: PathLike, what: What) -> dict[str, _Stored]:
    """Read the tensors of a file by all their names in the state_dict, and check that their parts fit together."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("load_sparse needs safetensors: pip install 'torch_sap[safetensors]'") from error
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["torch_sap"]) if "torch_sap" in metadata else _of_another_program(tensors)
        kind, version, packed, shared = (about[key] for key in ("kind", "format", "tensors", "shared"))
        if version != FORMAT:
            raise ValueError(f"{os.fspath(path)} must be of format {FORMAT}, got {version!r}")
        if what == "model" and kind != "model":
            raise ValueError(f'{os.fspath(path)} has masks alone: load them by what="masks", or save the whole model')
        found = {}
        for name, one in packed.items():
            parts = {part: tensors.pop(key) for part in PARTS if (key := f"{one['prefix']}.{part}") in tensors}
            try:
                found[name] = _unpack(name, parts, one, values=what == "model")
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
                raise _damaged(path, f"{name}: {error}") from error
        for name, tensor in tensors.items():
            found[name] = _Stored(name, tensor, None, tuple(tensor.shape))
        return {**found, **{alias: found[name] for alias, name in shared.items()}}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from error


def _of_another_program(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The description that torch_sap would give of the tensors in a file of compressed-tensors."""
    prefixes = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    found = {f"{prefix}.weight": {"prefix": prefix, "masked": True} for prefix in prefixes}
    return {"format": FORMAT, "kind": "model", "tensors": found, "shared": {}}


def _unpack(name: str, parts: Mapping[str, Tensor], about: Mapping[str, Any], *, values: bool) -> _Stored:
    """Make a tensor from its parts, or raise a ValueError if they do not fit together."""
    for part in PARTS if values else ("bitmask", "shape"):
        if part not in parts:
            raise ValueError(f"{about['prefix']}.{part} is missing")
    rows = tuple(parts["shape"].tolist())
    shape = tuple(about.get("shape", rows))
    if "shape" in about and rows != matrix_shape(shape):
        raise ValueError(f"its rows and columns must be {matrix_shape(shape)}, got {rows}")
    mask = unpack(parts["bitmask"], rows)
    remaining = int(count_true(mask))
    if about.get("remaining", remaining) != remaining:
        raise ValueError(f"{about['remaining']} entries must remain by its description, but {remaining} do by its bits")
    value = None
    if values:
        compressed = parts["compressed"]
        check_dtype(compressed, "its values")
        if compressed.shape != (remaining,):
            raise ValueError(f"it must have {remaining} values by its bits, got shape {tuple(compressed.shape)}")
        if len(rows) == 2 and not torch.equal(parts["row_offsets"], row_offsets(mask)):
            raise ValueError("its row offsets do not fit its bits")
        value = scatter_values(compressed, mask)
    return _Stored(name, value, mask if about["masked"] else None, shape)


def _damaged(path: PathLike, why: str) -> ValueError:
    return ValueError(f"{os.fspath(path)} is truncated or damaged: {why}. Nothing was loaded; write or copy it again")


def _pair(
    everything: list[_Held], stored: Mapping[str, _Stored], path: PathLike, what: What
) -> list[tuple[_Held, _Stored]]:
    """Each tensor of the model with what the file has of it, once."""
    held = {name: one for one in everything for name in (one.name, *one.aliases)}
    known = stored if what == "model" else {name: there for name, there in stored.items() if there.mask is not None}
    missing = sorted(set(held) - set(known)) if what == "model" else []
    unknown = sorted(set(known) - set(held))
    if missing or unknown:
        raise ValueError(f"{os.fspath(path)} must fit the model, but lacks {missing} and has unknown {unknown}")
    pairs: dict[int, tuple[_Held, _Stored]] = {}
    for name, there in known.items():
        before = pairs.setdefault(id(held[name]), (held[name], there))[1]
        if before is not there:
            raise ValueError(f"{before.name} and {name} are one tensor in the model, but two in {os.fspath(path)}")
    return list(pairs.values())


def _check_fit(held: _Held, there: _Stored, path: PathLike) -> None:
    """Raise a ValueError unless a tensor of a file fits the model's."""
    if there.mask is not None:
        check_dtype(held.tensor, there.name)
        if held.prunable is None:
            raise ValueError(f"{there.name} has a mask in {os.fspath(path)}, but is no parameter of the model")
    if there.value is not None and there.value.dtype is not held.tensor.dtype:
        raise ValueError(
            f"{there.name} must have the model's type {held.tensor.dtype}, but is {there.value.dtype} in "
            f"{os.fspath(path)}; convert the model first, as by model.to(dtype)"
        )
    if there.shape != tuple(held.tensor.shape):
        raise ValueError(
            f"{there.name} must have the model's shape {tuple(held.tensor.shape)}, but has {there.shape} in "
            f"{os.fspath(path)}"
        )
