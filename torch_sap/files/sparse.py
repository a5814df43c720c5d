"""Save pruned models as small safetensors files, with the remaining values and one bit per weight, and load them.

The tensors of a pruned weight have the names and the layout of compressed-tensors' "sparse-bitmask" format
(:mod:`torch_sap.files.bitmask`); docs/ship.md describes the file to the byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_sap.arguments import check_choice, check_model, check_path, needs, some
from torch_sap.decide.keys import INTEGER_OF, check_dtype, count_true, is_expanded
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.files.atomic import replacing
from torch_sap.files.bitmask import gather_values, matrix_shape, not_zero, pack, row_offsets, scatter_values, unpack
from torch_sap.masks.guards import guard
from torch_sap.masks.mask import finish, hold_masks
from torch_sap.masks.parameters import Pair, Prunable, check_names

PathLike = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)
What = Literal["model", "masks"]

FORMAT = 1
"""Version of the description in a file. A file with another number is refused."""

PARTS = ("bitmask", "shape", "row_offsets", "compressed")
"""Of a pruned tensor; a file of masks has the first two."""


def save_sparse(model: nn.Module, path: PathLike, *, what: What = "model") -> None:
    """Save a model as the values that pruning left and one bit per weight, bit for bit, in a safetensors file.

    A pruned tensor takes its remaining values, one bit per entry and 8 bytes per row. A weight without a mask, as
    :func:`remove` leaves it, is stored in the same way where that is smaller, with bits for the nonzero entries; of
    its zeros, -0.0 (which PyTorch's own masks leave) comes back as +0.0. Everything else in the state_dict is stored
    as it is, shared tensors once. The file is written under another name and renamed when it is complete.

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
    everything = _held_tensors(model, path, what, "save_sparse")
    about: dict[str, Any] = {"format": FORMAT, "kind": what, "tensors": {}}
    about["shared"] = {alias: held.name for held in everything for alias in held.aliases}
    pieces: list[tuple[str, Tensor]] = []
    for held in everything:
        masked, kept = _kept(held)
        if kept is not None and (masked or what == "model"):
            prefix = held.name.removesuffix(".weight")  # as compressed-tensors has it
            found = {"shape": list(kept.shape), "remaining": count_true(kept), "masked": masked}
            about["tensors"][held.name] = {"prefix": prefix, **found}
            bits, offsets = pack(kept)
            parts = [bits, torch.tensor(matrix_shape(kept.shape), device="cpu")]
            if what == "model":
                parts += [offsets, gather_values(held.tensor.detach().cpu(), kept)]
            pieces += [(f"{prefix}.{part}", tensor) for part, tensor in zip(PARTS, parts, strict=False)]
        elif what == "model":
            pieces.append((held.name, held.tensor.detach().cpu()))
    if what == "masks" and not pieces:
        raise ValueError("model must have masks to save, but no tensor of it is pruned; prune it first")
    _write(path, pieces, {"format": "pt", "torch_sap": json.dumps(about)})


def load_sparse(model: Model, path: PathLike, *, what: What = "model") -> Model:
    """Load a file of :func:`save_sparse` into a model of the same architecture, in place, bit for bit.

    Tensors that had a mask get it: the model is then pruned as the saved one was, whether it was dense or pruned
    before, and can be trained and pruned further. Names, shapes, types and counts are checked before the first value
    is written. A "sparse-bitmask" file of compressed-tensors can be loaded too.

    Args:
        model: The module to load into.
        path: The file.
        what: "model", or "masks" to give the model the masks alone. Then exactly those entries are pruned that are
            pruned in the file; the others keep their values, and an entry that was pruned before is 0.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file is truncated or inconsistent, or does not fit the model; the tensor is named.
        TypeError, NotImplementedError, ImportError: as in :func:`save_sparse`.
            The model is as before if anything is raised.
    """
    everything = _held_tensors(model, path, what, "load_sparse")
    pairs = _pair(everything, _read(path, what), path, what)
    masks: dict[Prunable, Tensor | None] = {}
    for held, there in pairs:
        if held.prunable is not None and there.mask is not None:
            masks[held.prunable] = there.mask.reshape(held.tensor.shape).to(held.tensor.device)
    pruned = [held.prunable for held in everything if held.prunable is not None and held.prunable.mask is not None]
    masks = dict.fromkeys(pruned) | masks  # None: nothing of the tensor is pruned in the file

    def change() -> None:
        hold_masks(list(masks), list(masks.values()))
        with torch.no_grad():
            for held, there in pairs:
                if there.value is not None and what == "model":
                    held.tensor.copy_(there.value.reshape(held.tensor.shape))
        guard(model)

    finish(change)
    return model


class _Held(NamedTuple):
    """One parameter (with its mask) or buffer of a model, and its keys in the state_dict of the dense model."""

    name: str
    aliases: list[str]
    tensor: Tensor
    prunable: Prunable | None


def _held_tensors(model: nn.Module, path: PathLike, what: What, function: str) -> list[_Held]:
    """Check the arguments, and list the parameters and buffers of a state_dict, each once, without masks."""
    check_model(model)
    check_path("path", path)
    check_choice("what", what, get_args(What))
    model = unwrap(model)
    holders: dict[int, list[Pair]] = {}
    masks, pruned = set(), set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            own = name.removesuffix("_orig")
            if own != name and (mask := module._buffers.get(f"{own}_mask")) is not None:
                masks.add(id(mask))
                pruned.add(id(parameter))
                name = own
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    buffers = {id(buffer) for buffer in model.buffers()}
    found: dict[int, _Held] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in masks:
            continue
        if id(tensor) not in holders and id(tensor) not in buffers:
            found_type = f"{key} is a {type(tensor).__name__} that is neither; keep it apart"
            raise TypeError(f"{function} needs a state_dict of parameters and buffers, but {found_type}")
        if id(tensor) in pruned:
            key = key.removesuffix("_orig")
        if is_dtensor(tensor):
            get = "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
            advice = f"use a model on one process with the full state_dict ({get})"
            raise NotImplementedError(f"{key} is sharded (a DTensor), which {function} cannot handle; {advice}")
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
    packed = count_true(kept) * tensor.itemsize + rows * (-(-columns // 8) + 8) + 16
    return False, kept if packed < tensor.nbytes else None


def _write(path: PathLike, pieces: list[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    with needs("save_sparse", "safetensors", "safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file
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
            raise OSError(f"{path} could not be written: {error}") from error
        except KeyError as error:  # safetensors has no name for a type
            (kind,) = error.args
            name = next(name for name, tensor in tensors.items() if tensor.dtype is kind)
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
    with needs("load_sparse", "safetensors", "safetensors"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "torch_sap" in metadata:
            about = json.loads(metadata["torch_sap"])
            kind, version, packed, shared = (about[key] for key in ("kind", "format", "tensors", "shared"))
        else:  # of compressed-tensors
            prefixes = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
            packed = {f"{prefix}.weight": {"prefix": prefix, "masked": True} for prefix in prefixes}
            kind, version, shared = "model", FORMAT, {}
        if version != FORMAT:
            raise ValueError(f"{path} must be of format {FORMAT}, got {version!r}")
        if what == "model" and kind != "model":
            raise ValueError(f'{path} has masks alone: load them by what="masks", or save the whole model')
        found = {}
        for name, one in packed.items():
            parts = {part: tensors.pop(key) for part in PARTS if (key := f"{one['prefix']}.{part}") in tensors}
            try:
                found[name] = _unpack(name, parts, one, values=what == "model")
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
                raise _damaged(path, f"{name}: {error}") from error
        found |= {name: _Stored(name, tensor, None, tuple(tensor.shape)) for name, tensor in tensors.items()}
        return found | {alias: found[name] for alias, name in shared.items()}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from error


def _unpack(name: str, parts: Mapping[str, Tensor], about: Mapping[str, Any], *, values: bool) -> _Stored:
    """Make a tensor from its parts; ValueError if they do not fit together."""
    for part in PARTS if values else PARTS[:2]:
        if part not in parts:
            raise ValueError(f"{about['prefix']}.{part} is missing")
    rows = tuple(parts["shape"].tolist())
    shape = tuple(about.get("shape", rows))
    if "shape" in about and rows != matrix_shape(shape):
        raise ValueError(f"its rows and columns must be {matrix_shape(shape)}, got {rows}")
    mask = unpack(parts["bitmask"], rows)
    remaining = count_true(mask)
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
    return ValueError(f"{path} is truncated or damaged: {why}. Nothing was loaded; write or copy it again")


def _pair(
    everything: list[_Held], stored: Mapping[str, _Stored], path: PathLike, what: What
) -> list[tuple[_Held, _Stored]]:
    """Pair each tensor of the model with its counterpart in the file, once, and check that they fit."""
    held = {name: one for one in everything for name in (one.name, *one.aliases)}
    known = stored if what == "model" else {name: there for name, there in stored.items() if there.mask is not None}
    missing = sorted(set(held) - set(known)) if what == "model" else []
    unknown = sorted(set(known) - set(held))
    if missing or unknown:
        raise ValueError(
            f"{path} must fit the model, but lacks {some(missing) or 'nothing'} and has unknown "
            f"{some(unknown) or 'nothing'}"
        )
    pairs: dict[int, tuple[_Held, _Stored]] = {}
    for name, there in known.items():
        before = pairs.setdefault(id(held[name]), (held[name], there))[1]
        if before is not there:
            raise ValueError(f"{before.name} and {name} are one tensor in the model, but two in {path}")
    for one, there in pairs.values():
        if there.mask is not None:
            check_dtype(one.tensor, there.name)
            if one.prunable is None:
                raise ValueError(f"{there.name} has a mask in {path}, but is no parameter of the model")
            check_names(one.prunable)
        dtype, shape, rule = one.tensor.dtype, tuple(one.tensor.shape), f"{there.name} must have the model's"
        if there.value is not None and there.value.dtype is not dtype:
            advice = "convert the model first, as by model.to(dtype)"
            raise ValueError(f"{rule} type {dtype}, but is {there.value.dtype} in {path}; {advice}")
        if what == "model" and is_expanded(one.tensor):
            raise ValueError(
                f"{there.name} must have memory of its own for each entry to load {path}, but it is expanded in the "
                "model; replace it by its clone()"
            )
        if there.shape != shape:
            raise ValueError(f"{rule} shape {shape}, but has {there.shape} in {path}")
    return list(pairs.values())
