"""What a sparse file is, to the byte, and how it is written."""

import json
import math
import weakref

import pytest
import torch
from torch import nn

import torch_sap
from torch_sap import save_sparse
from torch_sap.files import sparse_saving

safetensors = pytest.importorskip("safetensors")


def test_bytes_on_disk(tmp_path):
    """Values, one bit a weight, 8 bytes a row, and the shape: nothing else but the header."""
    model = nn.Sequential(nn.Linear(100, 30), nn.Conv2d(3, 8, 3, bias=False))
    report = torch_sap.layer_unstructured(model, eta_r=1.0)
    save_sparse(model, tmp_path / "model.safetensors")
    stored = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(stored[:8], "little")
    rows = 30 * (math.ceil(100 / 8) + 8) + 8 * (math.ceil(27 / 8) + 8)
    assert len(stored) - header == 4 * report.remaining + rows + 2 * 16 + 4 * 30


def test_each_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    model = nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 5)).double()
    torch_sap.layer_unstructured(model)
    model.register_buffer("odd", torch.zeros(3, dtype=torch.uint8))
    model.register_buffer("sixteen", torch.zeros(3, dtype=torch.float16))
    save_sparse(model, tmp_path / "model.safetensors")
    stored = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    del header["__metadata__"]
    widths = {"F64": 8, "I64": 8, "F16": 2, "U8": 1}
    assert length % 8 == 0
    assert all(found["data_offsets"][0] % widths[found["dtype"]] == 0 for found in header.values())
    assert {found["dtype"] for found in header.values()} == set(widths)


def test_the_layout_is_the_documented_one(tmp_path):
    model = nn.Sequential(nn.Linear(10, 3, bias=False))
    torch_sap.layer_unstructured(model, gamma=2.0)
    save_sparse(model, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mask, weight = model[0].weight_mask, model[0].weight.detach()
    assert set(found) == {"0.compressed", "0.bitmask", "0.shape", "0.row_offsets"}
    assert found["0.shape"].tolist() == [3, 10]
    assert torch.equal(found["0.compressed"], weight[mask])
    assert found["0.row_offsets"].tolist() == [0, int(mask[0].sum()), int(mask[:2].sum())]
    for row in range(3):
        places = [8 * byte + bit for byte in range(2) for bit in range(8) if found["0.bitmask"][row, byte] >> bit & 1]
        assert places == mask[row].nonzero().flatten().tolist()


def test_one_tensor_is_made_at_a_time(tmp_path, monkeypatch):
    """Values of one tensor are gone before those of the next are gathered."""
    model, alive, most = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))), [], []
    torch_sap.layer_unstructured(model)
    gather = sparse_saving.gather_values

    def counted(*args):
        most.append(sum(reference() is not None for reference in alive))
        values = gather(*args)
        alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(sparse_saving, "gather_values", counted)
    save_sparse(model, tmp_path / "model.safetensors")
    assert len(alive) == 6
    assert max(most) <= 1
