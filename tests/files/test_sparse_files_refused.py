"""Files that are damaged or do not fit are refused by name, and the model stays as it was; no half file is seen."""

import json
import sys

import pytest
import torch
from helpers import assert_unchanged, convnet, mlp, snapshot
from torch import nn

import torch_sap
from torch_sap import load_masks, load_sparse, save_masks, save_sparse
from torch_sap.files import sparse_loading, tensor_files

safetensors = pytest.importorskip("safetensors")
save_file = pytest.importorskip("safetensors.torch").save_file

LOAD = {"model": load_sparse, "masks": load_masks}


def pruned():
    model = mlp()
    torch_sap.layer_unstructured(model)
    return model


@pytest.fixture
def files(tmp_path):
    model = pruned()
    save_sparse(model, tmp_path / "model")
    save_masks(model, tmp_path / "masks")
    return tmp_path


def refuse(load, path, model, match, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", LOAD)
def test_every_flipped_byte_is_noticed(kind, files):
    """Some bytes of the header and of the rest, flipped one by one: refused, or (padding) without effect."""
    whole = (files / kind).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    state = {name: value.clone() for name, value in LOAD[kind](mlp(), files / kind).state_dict().items()}
    harmless = 0
    places = [*range(0, header, 37), *range(header, len(whole), 11)]
    for place in places:
        (files / "flipped").write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        model = mlp()
        before = snapshot(model)
        try:
            LOAD[kind](model, files / "flipped")
        except ValueError:
            assert_unchanged(model, before)
        else:
            harmless += 1
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert harmless <= 2


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(kind, share, files):
    whole = (files / kind).read_bytes()
    (files / "cut").write_bytes(whole[: int(share * len(whole))])
    refuse(LOAD[kind], files / "cut", mlp(), "cut is truncated or damaged")


def test_the_damaged_tensor_is_named(files):
    whole = bytearray((files / "model").read_bytes())
    whole[-1] ^= 0xFF  # bits come last
    (files / "flipped").write_bytes(whole)
    refuse(load_sparse, files / "flipped", pruned(), r"the bytes of 3.bitmask do not fit their checksum")


def test_no_file(tmp_path):
    refuse(load_sparse, tmp_path / "nothing", mlp(), "nothing", FileNotFoundError)


def test_another_kind_of_file(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "model.pt")
    refuse(load_sparse, tmp_path / "model.pt", mlp(), r"model.pt is truncated or damaged")


def test_masks_are_no_model(files):
    refuse(load_sparse, files / "masks", mlp(), "has masks alone, which load_masks loads")


@pytest.mark.parametrize("load", LOAD.values())
def test_another_architecture(load, files):
    path = files / ("model" if load is load_sparse else "masks")
    refuse(load, path, nn.Sequential(nn.Linear(6, 9)), r"has unknown \[.*'3.weight'")
    refuse(load, path, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), "0.weight must")


def test_a_tensor_too_few(files):
    class More(nn.Sequential):
        def __init__(self):
            super().__init__(*mlp())
            self.register_buffer("more", torch.zeros(1))

    refuse(load_sparse, files / "model", More(), r"lacks \['more'\] and has unknown \[\]")


def test_another_type(files):
    refuse(load_sparse, files / "model", mlp(torch.float16), r"0.weight must have the model's type torch.float16, but")
    load_masks(mlp(torch.float16), files / "masks")


def rewrite(files, change):
    """The file again with other contents and right checksums, or as a program without them would write it."""
    with safetensors.safe_open(files / "model", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["torch_sap"])
    change(tensors, about)
    del about["crc32"]
    pieces = [tensor_files.Piece(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    tensor_files.write(files / "changed", pieces, about)
    return files / "changed"


def set_item(key, value):
    return lambda tensors, about: tensors.update({key: value(tensors[key])})


CHANGES = {
    r"0.weight: it must have \d+ values by its bits": set_item("0.compressed", lambda t: t[1:].clone()),
    r"0.weight: its row offsets do not fit its bits": set_item("0.row_offsets", lambda t: t + 1),
    r"0.weight: its rows and columns must be \(9, 6\), got \(6, 9\)": set_item("0.shape", lambda t: t.flip(0)),
    r"0.weight: the bits must be uint8 of shape \(9, 1\)": set_item("0.bitmask", lambda t: t[1:].clone()),
    r"0.weight: the bits after the end of a row must be 0": set_item("0.bitmask", lambda t: t | 0x80),
    r"0.weight: \d+ entries must remain by its description": set_item("0.bitmask", lambda t: t & 0x3E),
    r"0.bitmask is missing": lambda tensors, about: tensors.pop("0.bitmask"),
    r"must be of format 1, got 2": lambda tensors, about: about.update(format=2),
    r"1.running_mean has a mask in .*, but is no parameter": lambda tensors, about: (
        about["tensors"].update({"1.running_mean": {**about["tensors"]["0.weight"], "shape": [9], "prefix": "x"}}),
        tensors.pop("1.running_mean"),
        tensors.update({"x.compressed": torch.ones(9), "x.bitmask": torch.tensor([[255, 1]], dtype=torch.uint8)}),
        tensors.update({"x.shape": torch.tensor([1, 9]), "x.row_offsets": torch.tensor([0])}),
        about["tensors"]["1.running_mean"].update(remaining=9),
    ),
}


@pytest.mark.parametrize("match", CHANGES)
def test_contents_that_do_not_belong_together(match, files):
    refuse(load_sparse, rewrite(files, CHANGES[match]), pruned(), match)


def test_files_of_other_programs_are_checked_by_counts(files):
    bits, shape = torch.tensor([[7]], dtype=torch.uint8), torch.tensor([1, 3])
    whole = {"compressed": torch.ones(3), "bitmask": bits, "shape": shape, "row_offsets": torch.tensor([0])}
    save_file({f"0.{name}": value for name, value in whole.items()}, files / "foreign")
    model = load_sparse(nn.Sequential(nn.Linear(3, 1, bias=False)), files / "foreign")
    assert torch.equal(model[0].weight, torch.ones(1, 3))
    assert model[0].weight_mask.all()
    save_file({f"0.{name}": value[:2].clone() for name, value in whole.items()}, files / "foreign")
    refuse(load_sparse, files / "foreign", nn.Sequential(nn.Linear(3, 1, bias=False)), "must have 3 values by its bits")


def test_what_cannot_be_saved(tmp_path):
    class State(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    def refused(model, error, match, save=save_sparse):
        with pytest.raises(error, match=match):
            save(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    refused("model", TypeError, "model must be a torch.nn.Module, got str")
    refused(nn.Sequential(State(2, 2)), TypeError, "save_sparse needs .* but 0._extra_state is a dict")
    refused(nn.Linear(2, 2, device="meta"), ValueError, "weight must have values, but it is on the meta device")
    refused(nn.LazyLinear(2), ValueError, "weight must have values")
    refused(mlp(), ValueError, "model must have masks to save", save_masks)
    odd = nn.Linear(2, 2)
    odd.register_buffer("number", torch.zeros(1, dtype=torch.complex128))
    refused(odd, TypeError, "number must be of a type that safetensors can hold, got torch.complex128")
    named = nn.Sequential(nn.Linear(4, 4))
    named[0].register_buffer("shape", torch.zeros(1))
    torch_sap.layer_unstructured(named)
    refused(named, ValueError, r"two would be called '0.shape'")


@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_what_was_there(there, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if there:
        save_sparse(mlp(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_sparse(convnet(), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_all_is_checked_before_the_first_value_is_written(files, monkeypatch):
    order = []
    check, hold = sparse_loading._check, sparse_loading._hold
    monkeypatch.setattr(sparse_loading, "_check", lambda *a, **k: (order.append("check"), check(*a, **k)))
    monkeypatch.setattr(sparse_loading, "_hold", lambda *a, **k: (order.append("hold"), hold(*a, **k)))
    load_sparse(mlp(), files / "model")
    assert order == ["check"] * 9 + ["hold"]


def test_without_safetensors_the_extra_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refuse(load_sparse, files / "model", mlp(), r"pip install 'torch_sap\[safetensors\]'", ImportError)
