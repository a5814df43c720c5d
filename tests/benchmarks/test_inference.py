"""The contestants of inference.py and sparse_files.py compute the same, at the stated sparsity."""

import pytest
import torch

import torch_sap

pytest.importorskip("timm")

import inference
import sparse_files


@pytest.mark.parametrize("case", inference.CASES)
@torch.inference_mode()
def test_equal_outputs_and_sparsity(case):
    entrants, x = inference.contestants(case, 0.9, 2, None)
    assert set(entrants) == {"dense", "zeros", "csr"}
    torch.testing.assert_close(entrants["csr"](x), entrants["zeros"](x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(entrants["dense"](x), entrants["zeros"](x), atol=1e-3)
    for layer in torch_sap.summary(entrants["zeros"]).tensors:
        assert layer.sparsity == pytest.approx(0.9, abs=1e-2)
    stored = sum(layer.weight.values().numel() for layer in entrants["csr"] if hasattr(layer, "weight"))
    assert stored == torch_sap.summary(entrants["zeros"]).remaining


@torch.inference_mode()
def test_another_output_is_noticed(monkeypatch):
    def broken(model):
        model = inference.nn.Sequential(*model)
        return lambda x: model(x) + 1e-2

    monkeypatch.setattr(inference, "sparse_form", broken)
    with pytest.raises(AssertionError, match="csr computes otherwise"):
        inference.contestants("mlp", 0.9, 2, None)


@torch.inference_mode()
def test_rows_and_picture(tmp_path):
    pytest.importorskip("onnxruntime")
    rows = inference.measure("mlp", 0.9, 1, tmp_path, 0.01)
    assert [row["contestant"] for row in rows] == ["dense", "zeros", "csr", "onnx"]
    assert rows[0]["ratio_to_dense"] == 1
    assert all(row["turns"] >= 4 and row["milliseconds"] > 0 for row in rows)
    inference.plot(rows, tmp_path / "inference.png")
    assert (tmp_path / "inference.png").stat().st_size > 5000


def test_sizes_and_times_of_files(tmp_path, monkeypatch):
    rows = {row["kind"]: row for row in sparse_files.measure("test_vit", 0.9, 1, tmp_path)}
    assert rows["torch.save, dense"]["share_of_dense"] == 1
    assert rows["save_sparse"]["bytes"] < 0.25 * rows["torch.save, pruned"]["bytes"]
    monkeypatch.setattr(torch_sap, "load_sparse", lambda model, path: model)
    with pytest.raises(AssertionError, match="other"):
        sparse_files.measure("test_vit", 0.9, 1, tmp_path)
