"""compressed-tensors reads what save_sparse writes, and load_sparse reads what compressed-tensors writes.

Versions before 0.15 can do it (extra "compressed-tensors"); later ones have no sparse formats.
"""

import pytest
import torch
from torch import nn

import torch_sap

save_file = pytest.importorskip("safetensors.torch").save_file
BitmaskCompressor = pytest.importorskip("compressed_tensors.compressors.sparse_compressors").BitmaskCompressor
BitmaskConfig = pytest.importorskip("compressed_tensors.config").BitmaskConfig


def make():
    return nn.Sequential(nn.Linear(37, 20), nn.ReLU(), nn.Linear(20, 11, bias=False))


def make_convolution():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))


def read_as_they_do(path):
    return dict(BitmaskCompressor(config=BitmaskConfig()).decompress(str(path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_they_read_ours(dtype, tmp_path):
    model = make().to(dtype)
    torch_sap.layer_unstructured(model, gamma=2.0)
    torch_sap.save_sparse(model, tmp_path / "model.safetensors")
    read = read_as_they_do(tmp_path / "model.safetensors")
    expected = torch_sap.remove(model).state_dict()
    assert set(read) == set(expected)
    for name, value in expected.items():
        assert value.dtype is read[name].dtype
        assert torch.equal(value, read[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_we_read_theirs(dtype, tmp_path):
    model = make().to(dtype)
    report = torch_sap.layer_unstructured(model, gamma=2.0)
    state = torch_sap.remove(model).state_dict()
    save_file(BitmaskCompressor(config=BitmaskConfig()).compress(state), tmp_path / "model.safetensors")
    other = torch_sap.load_sparse(make().to(dtype), tmp_path / "model.safetensors")
    assert int(other[0].weight_mask.sum() + other[2].weight_mask.sum()) == report.remaining
    assert all(torch.equal(value, state[name]) for name, value in torch_sap.remove(other).state_dict().items())


def test_convolutions_are_matrices_in_our_files(tmp_path):
    model = make_convolution()
    torch_sap.layer_unstructured(model)
    torch_sap.save_sparse(model, tmp_path / "ours.safetensors")
    state = torch_sap.remove(model).state_dict()
    assert torch.equal(read_as_they_do(tmp_path / "ours.safetensors")["0.weight"], state["0.weight"].flatten(1))
    save_file(BitmaskCompressor(config=BitmaskConfig()).compress(state), tmp_path / "theirs.safetensors")
    other = torch_sap.load_sparse(make_convolution(), tmp_path / "theirs.safetensors")
    assert torch.equal(other[0].weight, state["0.weight"])
