"""Checkpoint files: which of their tensors are pruned, and that a file is pruned as a model in memory is."""

import json
import os
import re
import zipfile

import pytest
import torch
from checkpoints import misalign, pruned_in_memory, shard, weights, write
from helpers import FUNCTIONS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import torch_sap
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files import weights as files
from torch_sap.files.weights import open_checkpoint, prune_checkpoint

RULE = Hyperparameters(eta_r=0.1)
each_scope = pytest.mark.parametrize("scope", list(FUNCTIONS))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_the_weights_of_a_file_are_those_of_the_model(tmp_path, suffix):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MultiheadAttention(8, 2))
    model.tok_embeddings = nn.Embedding(5, 6)
    found, _ = open_checkpoint(write(model.state_dict(), tmp_path / f"a{suffix}")).weights()
    wanted = {id(getattr(module, name)) for module, name in torch_sap.prunable_parameters(model)}
    expected = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
    assert_same_bits({one.name: one.tensor for one in found}, expected)


def test_files_of_save_sparse_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    torch_sap.save_sparse(nn.Linear(64, 10), path)
    advice = "load it with load_sparse, and save the state_dict of torch_sap.remove(model)"
    with pytest.raises(ValueError, match=re.escape(f"{path} was written by save_sparse: {advice}")):
        open_checkpoint(path)


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    write(weights(), tmp_path / "b.pt")
    assert open_checkpoint(tmp_path).files == [tmp_path / "b.pt"]
    write(weights(), tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path).files == [tmp_path / "a.safetensors"]
    write(weights(), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"several checkpoints, name one: a\.safetensors, c\.safetensors"):
        open_checkpoint(tmp_path)
    folder = shard(weights(), tmp_path / "sharded")
    assert sorted(open_checkpoint(folder).files) == sorted(folder.iterdir())
    assert {t.name for t in open_checkpoint(folder).tensors} == set(weights())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "must be an index with a weight_map"),
        ('{"weight_map": ["a"]}', "must be an index with a weight_map"),
        ('{"weight_map": {}}', "must name files of its own folder"),
        ('{"weight_map": {"a.weight": "../a.safetensors"}}', "must name files of its own folder"),
    ],
)
def test_bad_indices(tmp_path, content, message):
    (tmp_path / "model.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "model.index.json")
    (tmp_path / "model.index.json").write_text('{"weight_map": {"a.weight": "a.safetensors"}}')
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path)


def damaged(path, how):
    data = write(weights(), path).read_bytes()
    path.write_bytes(how(data))
    return path


@pytest.mark.parametrize("how", [lambda d: b"", lambda d: d[:100], lambda d: d[:-20], lambda d: b"x" * 200], ids="abcd")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files(tmp_path, suffix, how):
    path = damaged(tmp_path / f"a{suffix}", how)
    with pytest.raises(ValueError, match=r"is not a safetensors file|is not a file of torch\.save|or is damaged"):
        open_checkpoint(path)


def test_pytorch_files_that_are_not_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(3, 3), path)
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\)"):
        open_checkpoint(path)
    torch.save(torch.ones(3, 3), path)
    with pytest.raises(ValueError, match="must hold a dictionary of tensors, got Tensor"):
        open_checkpoint(path)
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6"):
        open_checkpoint(path)
    with pytest.raises(ValueError, match="must end in one of"):
        open_checkpoint(write(weights(), tmp_path / "a.zip"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_cannot_be_pruned(tmp_path, suffix):
    integers = write(weights() | {"a.weight": torch.ones(3, 3, dtype=torch.int8)}, tmp_path / f"a{suffix}")
    with pytest.raises(
        TypeError, match=r"a\.weight must be a real floating-point tensor .*, got (I8|int8); exclude it"
    ):
        open_checkpoint(integers).weights()
    assert "a.weight" not in {tensor.name for tensor in open_checkpoint(integers).weights(exclude="a")[0]}
    with pytest.raises(ValueError, match="has no weight to prune"):
        open_checkpoint(write({"bias": torch.ones(3)}, tmp_path / f"b{suffix}")).weights()
    with pytest.raises(
        ValueError, match="exclude must match a parameter with more than one dimension, but 'stm' matches none"
    ):
        open_checkpoint(write(weights(), tmp_path / f"c{suffix}")).weights(exclude="stm")


def test_masks_and_overlaps_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(5, 5))
    torch_sap.layer_unstructured(model)
    with pytest.raises(ValueError, match=r"belongs to a model with masks; save torch_sap\.remove"):
        open_checkpoint(write(model.state_dict(), tmp_path / "a.pt")).weights()
    whole = torch.randn(6, 4)
    overlapping = write({"a.weight": whole, "b.weight": whole[2:4]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="share a part of their memory"):
        open_checkpoint(overlapping).weights()
    assert [t.name for t in open_checkpoint(overlapping).weights(exclude="a")[0]] == ["b.weight"]
    with pytest.raises(ValueError, match="view with gaps"):
        open_checkpoint(write({"a.weight": whole[:, :2]}, tmp_path / "c.pt")).weights()


def in_order(path, values):
    """The values in the order in which a file has them."""
    return {stored.name: values[stored.name] for stored in open_checkpoint(path).tensors}


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_scope
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_is_pruned_as_memory_is(tmp_path, scope, dtype, suffix):
    values = weights(dtype)
    path, out = write(values, tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
    before = path.read_bytes()
    report = prune_checkpoint(path, out, scope, RULE)
    expected, in_memory = pruned_in_memory(in_order(path, values), scope, eta_r=0.1)
    assert_same_bits(load(out), expected)
    assert json.dumps(report.to_dict()) == json.dumps(in_memory.to_dict())
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [path.name, out.name]


def test_every_other_byte_of_a_safetensors_file_stays(tmp_path):
    path = write(weights(torch.bfloat16), tmp_path / "a.safetensors", format="pt", license="none")
    prune_checkpoint(path, tmp_path / "b.safetensors", "layer", RULE)
    old, new = path.read_bytes(), (tmp_path / "b.safetensors").read_bytes()
    assert len(old) == len(new)
    assert {byte for before, byte in zip(old, new, strict=True) if before != byte} == {0}


@each_scope
def test_unaligned_tensors(tmp_path, scope):
    values = weights()
    path, out = misalign(write(values, tmp_path / "a.safetensors")), tmp_path / "b.safetensors"
    prune_checkpoint(path, out, scope, RULE)
    assert_same_bits(load_file(out), pruned_in_memory(in_order(path, values), scope, eta_r=0.1)[0])


@each_scope
def test_negative_zeros_are_zeros(tmp_path, scope):
    values = weights()
    negative = {
        name: torch.where(value == 0, -0.0, value) for name, value in values.items() if value.is_floating_point()
    }
    paths = [write(each, tmp_path / f"{i}.safetensors") for i, each in enumerate((values, values | negative))]
    reports = [prune_checkpoint(path, path, scope, RULE, overwrite=True) for path in paths]
    assert json.dumps(reports[0].to_dict()) == json.dumps(reports[1].to_dict())
    found = [load_file(path) for path in paths]
    for one in reports[0].tensors:
        assert torch.equal(found[0][one.name], found[1][one.name])


def test_mixed_types(tmp_path):
    values = {
        "a.weight": torch.randn(50, 30).to(torch.float16),
        "b.weight": torch.randn(60, 20).to(torch.bfloat16),
        "c.weight": torch.randn(30, 20),
    }
    path = write(values, tmp_path / "a.safetensors")
    prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    expected, _ = pruned_in_memory(in_order(path, values), "global", eta_r=0.1)
    assert_same_bits(load_file(tmp_path / "b.safetensors"), expected)


def test_shards_are_pruned_together_and_keep_their_files_metadata_and_index(tmp_path):
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


def test_a_pytorch_file_keeps_everything_else(tmp_path):
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


def test_one_of_several_state_dicts(tmp_path):
    values, average = weights(seed=1), weights(seed=2)
    path, out = write({"state_dict": values, "state_dict_ema": average}, tmp_path / "a.pt"), tmp_path / "b.pt"
    with pytest.raises(ValueError, match="several state_dicts, choose one with --key: state_dict, state_dict_ema"):
        prune_checkpoint(path, out, "global", RULE)
    with pytest.raises(ValueError, match=r"key must name .*, one of 'state_dict', 'state_dict_ema', got"):
        prune_checkpoint(path, out, "global", RULE, key="ema")
    plain = write(values, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain.pt is a state_dict itself; leave it out, got key='ema'"):
        prune_checkpoint(plain, out, "global", RULE, key="ema")
    empty = write({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"empty.pt holds no state_dict; leave it out, got key='ema'"):
        prune_checkpoint(empty, out, "global", RULE, key="ema")
    prune_checkpoint(path, out, "global", RULE, key="state_dict_ema")
    found = torch.load(out, weights_only=True)
    assert_same_bits(found["state_dict"], values)
    assert_same_bits(found["state_dict_ema"], pruned_in_memory(average, "global", eta_r=0.1)[0])


def test_shared_weights_count_once_and_stay_shared(tmp_path):
    shared = nn.Parameter(torch.randn(50, 40))
    path, out = write({"a.weight": shared, "b.weight": shared}, tmp_path / "a.pt"), tmp_path / "b.pt"
    report = prune_checkpoint(path, out, "global", RULE)
    assert report.total == shared.numel()
    found = torch.load(out, weights_only=True)
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    assert int((found["a.weight"] == 0).sum()) == report.pruned


@each_scope
def test_channels_last(tmp_path, scope):
    values = {"a.weight": ((torch.randn(30, 20, 3, 3) * 3).round() / 3).contiguous(memory_format=torch.channels_last)}
    path, out = write(values, tmp_path / "a.pt"), tmp_path / "b.pt"
    prune_checkpoint(path, out, scope, RULE)
    assert_same_bits(torch.load(out, weights_only=True), pruned_in_memory(values, scope, eta_r=0.1)[0])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_nothing_is_overwritten_unless_asked(tmp_path, suffix):
    path = write(weights(), tmp_path / f"a{suffix}")
    path.chmod(0o640)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        prune_checkpoint(path, path, "global", RULE)
    assert path.read_bytes() == before
    out = tmp_path / f"b{suffix}"
    prune_checkpoint(path, out, "global", RULE)
    prune_checkpoint(path, path, "global", RULE, overwrite=True)
    assert_same_bits(load(path), load(out))
    assert path.read_bytes() != before
    assert [file.stat().st_mode & 0o777 for file in (path, out)] == [0o640, 0o640]


@each_scope
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_nothing_is_left_of_a_failure(tmp_path, scope, suffix):
    values = weights() | {"tail.weight": torch.full((3, 3), float("nan"))}
    path, folder = write(values, tmp_path / f"a{suffix}"), shard(values, tmp_path / "in")
    for source, out in ((path, tmp_path / f"b{suffix}"), (folder, tmp_path / "out" / "deep")):
        with pytest.raises(ValueError, match=r"must be finite, but tail\.weight"):
            prune_checkpoint(source, out, scope, RULE)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "in"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_shard_is_renamed_before_all_are_complete(tmp_path, monkeypatch):
    folder = shard(weights(), tmp_path / "in")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    flushed = []

    def fail(mapped):
        flushed.append(mapped)
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.MappedFile, "flush", fail)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(folder, folder, "global", RULE, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_invalid_outputs(tmp_path):
    path = write(weights(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"out must end in \.safetensors"):
        prune_checkpoint(path, tmp_path / "b.pt", "global", RULE)
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        prune_checkpoint(path, tmp_path / "c.safetensors", "global", RULE, overwrite=True)
    with pytest.raises(FileNotFoundError):
        prune_checkpoint(path, tmp_path / "no" / "b.safetensors", "global", RULE)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_the_work_is_counted_while_it_is_done(tmp_path, scope):
    values = weights()
    path, calls = write(values, tmp_path / "a.safetensors"), []
    out = tmp_path / "b.safetensors"
    report = prune_checkpoint(path, out, scope, RULE, advance=lambda *call: calls.append(call))
    work = 2 * sum(one.total for one in report.tensors)
    assert {total for _, total in calls} == {work}
    assert work / 2 < sum(done for done, _ in calls) <= work, "measured and written; an empty or zero tensor is not"
    silent = tmp_path / "c.safetensors"
    prune_checkpoint(path, silent, scope, RULE)
    assert silent.read_bytes() == out.read_bytes()
