import json
import os
import zipfile

import pytest
import torch
import torch_sap.decide.streaming as streaming
from checkpoints import FUNCTIONS, pruned_in_memory, shard, weights, write
from safetensors import safe_open
from safetensors.torch import load_file

import torch_sap.files.checkpoint_pruning as checkpoint_pruning
import torch_sap.files.checkpoint_reading as checkpoint_reading
import torch_sap.files.checkpoint_writing as checkpoint_writing
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files.checkpoint_pruning import prune_checkpoint
from torch_sap.files.weights import open_checkpoint

RULE = Hyperparameters(eta_r=0.1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces, and samples, of which even the small files of these tests have several."""
    monkeypatch.setattr(checkpoint_reading, "PIECE", 2**13)
    monkeypatch.setattr(checkpoint_writing, "PIECE", 2**13)
    monkeypatch.setattr(checkpoint_reading, "SAMPLE", (2**12, 2**12))


def in_order(path, values):
    """The values in the order in which a file has them."""
    names = [tensor.name for tensor in open_checkpoint(path).tensors]
    return {name: values[name] for name in names}


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", list(FUNCTIONS))
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_is_pruned_as_memory_is(tmp_path, scope, dtype, suffix):
    values = weights(dtype)
    path, out = write(values, tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
    report = prune_checkpoint(path, out, scope, RULE)
    expected, in_memory = pruned_in_memory(in_order(path, values), scope, eta_r=0.1)
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert_same_bits(found, expected)
    assert report.tensors == in_memory.tensors
    assert json.dumps(report.to_dict()) == json.dumps(in_memory.to_dict())


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_a_guess_that_is_wrong_costs_time_only(tmp_path, monkeypatch, spread):
    monkeypatch.setattr(streaming, "MARGIN", spread)
    monkeypatch.setattr(checkpoint_reading, "RUN", 1)
    monkeypatch.setattr(checkpoint_reading, "SAMPLE", (64, 64))
    values = weights()
    path, out = write(values, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    prune_checkpoint(path, out, "global", RULE)
    expected, _ = pruned_in_memory(in_order(path, values), "global", eta_r=0.1)
    assert_same_bits(load_file(out), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weights_are_read_twice(tmp_path, monkeypatch, dtype):
    read = []
    monkeypatch.setattr(checkpoint_pruning, "pieces_of", lambda tensors: read.append(1) or original(tensors))
    original = checkpoint_reading.pieces_of
    path = write({"a.weight": torch.randn(500, 300).to(dtype)}, tmp_path / "a.safetensors")
    prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    assert len(read) == 2


def test_half_precision_of_two_kinds(tmp_path):
    values = {"a.weight": torch.randn(50, 300).to(torch.float16), "b.weight": torch.randn(60, 200).to(torch.bfloat16)}
    path = write(values, tmp_path / "a.safetensors")
    prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    expected, _ = pruned_in_memory(in_order(path, values), "global", eta_r=0.1)
    assert_same_bits(load_file(tmp_path / "b.safetensors"), expected)


@pytest.mark.parametrize("whole", [2**28, 2**14, 0], ids=["all", "some", "none"])
def test_layers_that_memory_holds_are_read_once(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(checkpoint_pruning, "WHOLE", whole)
    read: dict[str, int] = {}

    def pieces_of(tensors, **how):
        for piece in original(tensors, **how):
            read[piece.tensor.name] = read.get(piece.tensor.name, 0) + len(piece.memory)
            yield piece

    original = checkpoint_reading.pieces_of
    monkeypatch.setattr(checkpoint_pruning, "pieces_of", pieces_of)
    values = weights(torch.bfloat16)
    path, out = write(values, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    report = prune_checkpoint(path, out, "layer", RULE)
    expected, in_memory = pruned_in_memory(in_order(path, values), "layer", eta_r=0.1)
    assert_same_bits(load_file(out), expected)
    assert json.dumps(report.to_dict()) == json.dumps(in_memory.to_dict())
    for name, count in read.items():
        size = values[name].nbytes
        assert count == size if size <= whole else count >= 2 * size, name


def test_shards_keep_their_files_metadata_and_index(tmp_path):
    values = weights(torch.bfloat16)
    folder, out = shard(values, tmp_path / "in"), tmp_path / "out"
    report = prune_checkpoint(folder, out, "global", RULE)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
    expected, in_memory = pruned_in_memory(in_order(folder, values), "global", eta_r=0.1)
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as new, safe_open(folder / file.name, "pt") as old:
            assert new.metadata() == old.metadata() == {"format": "pt"}
        found |= load_file(file)
    assert_same_bits(found, expected)
    assert report.pruned == in_memory.pruned
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (folder / index).read_bytes()
    prune_checkpoint(folder / index, tmp_path / "by_index", "global", RULE)
    for file in out.iterdir():
        assert (tmp_path / "by_index" / file.name).read_bytes() == file.read_bytes()


def test_a_pytorch_file_is_whole_but_for_its_zeros(tmp_path):
    values = weights()
    content = {"epoch": 3, "state_dict": values, "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}}}
    path, out = write(content, tmp_path / "a.pt"), tmp_path / "b.pt"
    prune_checkpoint(path, out, "layer", RULE)
    found = torch.load(out, weights_only=True, mmap=True)
    assert found["epoch"] == 3
    assert found["optimizer"]["state"][0]["step"] == 2
    assert_same_bits(found["state_dict"], pruned_in_memory(values, "layer", eta_r=0.1)[0])
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        records = archive.infolist()
    with zipfile.ZipFile(path) as archive:
        assert [r.header_offset for r in archive.infolist()] == [r.header_offset for r in records]


def test_one_of_several_state_dicts(tmp_path):
    values, average = weights(seed=1), weights(seed=2)
    path, out = write({"state_dict": values, "state_dict_ema": average}, tmp_path / "a.pt"), tmp_path / "b.pt"
    with pytest.raises(ValueError, match="several state_dicts, choose one with --key: state_dict, state_dict_ema"):
        prune_checkpoint(path, out, "global", RULE)
    with pytest.raises(ValueError, match="key must name a state_dict"):
        prune_checkpoint(path, out, "global", RULE, key="ema")
    prune_checkpoint(path, out, "global", RULE, key="state_dict_ema")
    found = torch.load(out, weights_only=True)
    assert_same_bits(found["state_dict"], values)
    assert_same_bits(found["state_dict_ema"], pruned_in_memory(average, "global", eta_r=0.1)[0])


def test_shared_weights_count_once(tmp_path):
    shared = torch.randn(50, 40)
    path, out = write({"a.weight": shared, "b.weight": shared}, tmp_path / "a.pt"), tmp_path / "b.pt"
    report = prune_checkpoint(path, out, "global", RULE)
    assert report.total == shared.numel()
    found = torch.load(out, weights_only=True)
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert int((found["a.weight"] == 0).sum()) == report.pruned


@pytest.mark.parametrize("scope", list(FUNCTIONS))
def test_channels_last(tmp_path, scope):
    values = {"a.weight": ((torch.randn(30, 20, 3, 3) * 3).round() / 3).contiguous(memory_format=torch.channels_last)}
    path, out = write(values, tmp_path / "a.pt"), tmp_path / "b.pt"
    prune_checkpoint(path, out, scope, RULE)
    assert_same_bits(torch.load(out, weights_only=True), pruned_in_memory(values, scope, eta_r=0.1)[0])


def test_what_is_excluded_stays(tmp_path):
    values = weights()
    path, out = write(values, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    report = prune_checkpoint(path, out, "layer", RULE, exclude=["body", "head"])
    assert list(report.groups) == ["stem.weight"]
    found = load_file(out)
    assert_same_bits(
        {k: found[k] for k in found if k != "stem.weight"}, {k: values[k] for k in values if k != "stem.weight"}
    )


def test_nothing_is_overwritten_unless_asked(tmp_path):
    path = write(weights(), tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        prune_checkpoint(path, path, "global", RULE)
    assert path.read_bytes() == before
    out = tmp_path / "b.safetensors"
    prune_checkpoint(path, out, "global", RULE)
    prune_checkpoint(path, path, "global", RULE, overwrite=True)
    assert path.read_bytes() == out.read_bytes() != before


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    values = weights() | {"tail.weight": torch.full((3, 3), float("nan"))}
    path = write(values, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"tail\.weight must be finite"):
        prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    with pytest.raises(ValueError, match=r"must be finite, but tail\.weight"):
        prune_checkpoint(path, tmp_path / "b.safetensors", "neuron", RULE)
    folder = shard(values, tmp_path / "in")
    for whole in (2**28, 0):
        monkeypatch.setattr(checkpoint_pruning, "WHOLE", whole)
        with pytest.raises(ValueError, match=r"(must be finite, but tail\.weight|tail\.weight must be finite)"):
            prune_checkpoint(folder, tmp_path / "out", "layer", RULE)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "in"]


def test_outputs_that_cannot_be(tmp_path):
    path = write(weights(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"out must end in \.safetensors"):
        prune_checkpoint(path, tmp_path / "b.pt", "global", RULE)
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        prune_checkpoint(path, tmp_path / "c.safetensors", "global", RULE, overwrite=True)
    with pytest.raises(FileNotFoundError):
        prune_checkpoint(path, tmp_path / "no" / "b.safetensors", "global", RULE)
    with pytest.raises(ValueError, match="q must be at most 6"):
        prune_checkpoint(path, tmp_path / "b.safetensors", "global", Hyperparameters(1.0, 7.0))
