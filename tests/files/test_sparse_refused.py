"""Files that are damaged or do not fit are refused and the model stays unchanged; no incomplete file is left."""

import json
import os
import sys

import pytest
import torch
from helpers import assert_unchanged, convnet, mlp, snapshot
from torch import nn

import torch_sap
from torch_sap import load_sparse, save_sparse
from torch_sap.files import sparse

safetensors = pytest.importorskip("safetensors")
save_file = pytest.importorskip("safetensors.torch").save_file

KINDS = ("model", "masks")


def pruned():
    model = mlp()
    torch_sap.layer_unstructured(model)
    return model


@pytest.fixture
def files(tmp_path):
    model = pruned()
    for what in KINDS:
        save_sparse(model, tmp_path / what, what=what)
    return tmp_path


def refuse(path, model, match, error=ValueError, what="model"):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load_sparse(model, path, what=what)
    assert_unchanged(model, before)


@pytest.mark.parametrize("what", KINDS)
def test_a_flipped_byte_of_the_description_or_the_bits_is_noticed_or_harmless(what, files):
    """Each flip is refused or changes neither masks nor names. Values have no checksum."""
    whole = (files / what).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    masks = {name: mask.clone() for name, mask in load_sparse(mlp(), files / what, what=what).named_buffers()}
    places = json.loads(whole[8:header])
    bits = [
        header + place
        for name, found in places.items()
        if name.endswith(".bitmask")
        for place in range(*found["data_offsets"])
    ]
    for place in [*range(0, header, 7), *bits]:
        (files / "flipped").write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        model = mlp()
        before = snapshot(model)
        try:
            load_sparse(model, files / "flipped", what=what)
        except ValueError:
            assert_unchanged(model, before)
        else:
            assert place < header
            assert {name for name, _ in model.named_buffers()} == set(masks)
            assert all(torch.equal(mask, masks[name]) for name, mask in model.named_buffers() if "mask" in name)


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(what, share, files):
    whole = (files / what).read_bytes()
    (files / "cut").write_bytes(whole[: int(share * len(whole))])
    refuse(files / "cut", mlp(), "cut is truncated or damaged", what=what)


def test_files_that_are_missing_or_of_another_kind(files):
    refuse(files / "nothing", mlp(), "nothing", FileNotFoundError)
    torch.save(mlp().state_dict(), files / "model.pt")
    refuse(files / "model.pt", mlp(), r"model.pt is truncated or damaged")
    refuse(files / "masks", mlp(), 'has masks alone: load them by what="masks"')


@pytest.mark.parametrize("what", KINDS)
def test_another_architecture(what, files):
    refuse(
        files / what, nn.Sequential(nn.Linear(6, 9)), r"lacks nothing and has unknown .*(1\.bias|3\.weight)", what=what
    )
    narrow = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    refuse(files / what, narrow, "0.weight must", what=what)


def test_a_missing_tensor(files):
    class More(nn.Sequential):
        def __init__(self):
            super().__init__(*mlp())
            self.register_buffer("more", torch.zeros(1))

    refuse(files / "model", More(), "lacks more and has unknown nothing")


def test_another_type(files):
    refuse(files / "model", mlp(torch.float16), r"0.weight must have the model's type torch.float16, but")
    load_sparse(mlp(torch.float16), files / "masks", what="masks")


def rewrite(files, change):
    """Write the file again with other contents."""
    with safetensors.safe_open(files / "model", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["torch_sap"])
    change(tensors, about)
    save_file(tensors, files / "changed", {"torch_sap": json.dumps(about)})
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
    r"0.weight: its values must be a real floating-point tensor .*int32": set_item("0.compressed", lambda t: t.int()),
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
def test_inconsistent_contents(match, files):
    refuse(rewrite(files, CHANGES[match]), pruned(), match)


def test_files_of_other_programs_are_checked_by_counts(files):
    bits, shape = torch.tensor([[7]], dtype=torch.uint8), torch.tensor([1, 3])
    whole = {"compressed": torch.ones(3), "bitmask": bits, "shape": shape, "row_offsets": torch.tensor([0])}
    save_file({f"0.{name}": value for name, value in whole.items()}, files / "foreign")
    model = load_sparse(nn.Sequential(nn.Linear(3, 1, bias=False)), files / "foreign")
    assert torch.equal(model[0].weight, torch.ones(1, 3))
    assert model[0].weight_mask.all()
    save_file({f"0.{name}": value[:2].clone() for name, value in whole.items()}, files / "foreign")
    refuse(files / "foreign", nn.Sequential(nn.Linear(3, 1, bias=False)), "must have 3 values by its bits")


def test_what_cannot_be_saved(tmp_path):
    class State(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    def refused(model, error, match, what="model"):
        with pytest.raises(error, match=match):
            save_sparse(model, tmp_path / "model", what=what)
        assert list(tmp_path.iterdir()) == []

    refused("model", TypeError, "model must be a torch.nn.Module, got str")
    refused(nn.Sequential(State(2, 2)), TypeError, "save_sparse needs .* but 0._extra_state is a dict")
    refused(nn.Linear(2, 2, device="meta"), ValueError, "weight must have values, but it is on the meta device")
    refused(nn.LazyLinear(2), ValueError, "weight must have values")
    refused(mlp(), ValueError, "model must have masks to save", what="masks")
    refused(mlp(), ValueError, "what must be one of 'model', 'masks', got what='bits'", what="bits")
    odd = nn.Linear(2, 2)
    odd.register_buffer("number", torch.zeros(1, dtype=torch.complex128))
    refused(odd, TypeError, "number must be of a type that safetensors can hold, got torch.complex128")
    named = nn.Sequential(nn.Linear(4, 4))
    named[0].register_buffer("shape", torch.zeros(1))
    torch_sap.layer_unstructured(named)
    refused(named, ValueError, r"two would be called '0.shape'")


def test_a_write_that_fails_leaves_the_old_file(files, monkeypatch):
    before = {file.name: file.read_bytes() for file in files.iterdir()}

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("model", "new"):
        with pytest.raises(OSError, match="no space"):
            save_sparse(convnet(), files / name)
    assert {file.name: file.read_bytes() for file in files.iterdir()} == before


@pytest.mark.parametrize("what", KINDS)
def test_an_interrupt_while_values_are_written_is_raised_after_all_are(what, files, monkeypatch):
    expected = load_sparse(mlp(), files / what, what=what)
    calls = []

    def guard(model):
        calls.append(model)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sparse, "guard", guard)
    model = mlp()
    with pytest.raises(KeyboardInterrupt):
        load_sparse(model, files / what, what=what)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_without_safetensors_the_extra_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refuse(files / "model", mlp(), r"pip install 'torch_sap\[safetensors\]'", ImportError)
    with pytest.raises(ImportError, match=r"save_sparse needs safetensors: pip install"):
        save_sparse(mlp(), files / "new")


def test_a_file_of_another_model_is_refused_in_a_line(files):
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    refuse(files / "model", deep, r"lacks .*, and 589 more and has unknown")
