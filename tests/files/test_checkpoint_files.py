import json
import re
import zipfile

import pytest
import torch
from checkpoints import shard, weights, write
from torch import nn

import torch_sap
from torch_sap.files.weights import open_checkpoint


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_weights_are_those_of_the_model(tmp_path, suffix):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 6), nn.MultiheadAttention(8, 2))
    path = write(model.state_dict(), tmp_path / f"a{suffix}")
    found = open_checkpoint(path).weights()
    expected = {name: dict(model.named_parameters())[name] for name in (t.name for t in found)}
    wanted = {id(getattr(module, name)) for module, name in torch_sap.prunable_parameters(model)}
    assert {id(parameter) for parameter in expected.values()} == wanted
    data = path.read_bytes()
    for tensor in found:
        here = torch.frombuffer(bytearray(data[tensor.offset : tensor.offset + tensor.nbytes]), dtype=tensor.dtype)
        assert torch.equal(here.view(tensor.shape), expected[tensor.name].detach())


@pytest.mark.parametrize("exclude", [(), "2"], ids=["all pruned", "one weight is stored as it is"])
def test_sparse_files_say_what_to_do(tmp_path, exclude):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    torch_sap.layer_unstructured(model, exclude=exclude)
    path = tmp_path / "a.safetensors"
    torch_sap.save_sparse(model, path)
    advice = "load it with load_sparse, and save the state_dict of torch_sap.remove(model)"
    with pytest.raises(ValueError, match=re.escape(f"{path} was written by save_sparse: {advice}")):
        open_checkpoint(path)
    again = torch_sap.load_sparse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), path)
    path = write(torch_sap.remove(again).state_dict(), tmp_path / "plain.safetensors")
    assert [tensor.name for tensor in open_checkpoint(path).weights()] == ["0.weight", "2.weight"]


def test_files_of_masks_say_what_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    torch_sap.layer_unstructured(model)
    torch_sap.save_masks(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="was written by save_masks: it has no weights"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    write(weights(), tmp_path / "b.pt")
    assert open_checkpoint(tmp_path).files == (tmp_path / "b.pt",)
    write(weights(), tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path).files == (tmp_path / "a.safetensors",)
    write(weights(), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"several checkpoints, name one: a\.safetensors, c\.safetensors"):
        open_checkpoint(tmp_path)
    folder = shard(weights(), tmp_path / "sharded")
    assert len(open_checkpoint(folder).files) == 2
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


def test_a_missing_shard(tmp_path):
    (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": {"a.weight": "a.safetensors"}}))
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
    with pytest.raises(ValueError, match=r"is no safetensors file|is no file of torch\.save|or is damaged"):
        open_checkpoint(path)


def test_pytorch_files_that_are_no_checkpoints(tmp_path):
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


def test_a_storage_that_no_tensor_uses(tmp_path):
    """The places of all others are known by the first one, which it could be."""
    path = write(weights(), tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data/99", b"1234")
    with pytest.raises(ValueError, match=r"a\.pt is damaged: its storages are not those of its directory"):
        open_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_cannot_be_pruned(tmp_path, suffix):
    integers = write(weights() | {"a.weight": torch.ones(3, 3, dtype=torch.int8)}, tmp_path / f"a{suffix}")
    with pytest.raises(
        TypeError, match=r"a\.weight must be a real floating-point tensor .*, got (I8|int8); exclude it"
    ):
        open_checkpoint(integers).weights()
    assert "a.weight" not in {tensor.name for tensor in open_checkpoint(integers).weights(exclude="a")}
    with pytest.raises(ValueError, match="has no weight to prune"):
        open_checkpoint(write({"bias": torch.ones(3)}, tmp_path / f"b{suffix}")).weights()
    with pytest.raises(ValueError, match="exclude must match a prunable parameter, but 'stm' matches none"):
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
    assert [t.name for t in open_checkpoint(overlapping).weights(exclude="a")] == ["b.weight"]
    with pytest.raises(ValueError, match="view with gaps"):
        open_checkpoint(write({"a.weight": whole[:, :2]}, tmp_path / "c.pt")).weights()
