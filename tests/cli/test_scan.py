"""A scan of a file or a model gives what the measures and the whole-model functions give."""

import copy

import numpy as np
import pytest
import torch
from checkpoints import misalign, pruned_in_memory, shard, weights, write
from helpers import FUNCTIONS
from torch import nn

import torch_sap
from torch_sap.cli import scan as scanning
from torch_sap.cli.scan import scan_entries
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files.weights import open_checkpoint
from torch_sap.masks.parameters import resolve

RULE = Hyperparameters(eta_r=0.1)


def scan_file(path):
    return scan_entries([one.entry() for one in open_checkpoint(path).weights()[0]], RULE, str(path))


def scan_model(model):
    return scan_entries([prunable.entry() for prunable in resolve(model).prunables], RULE, "model")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 2**11)


def assert_scan_is(scan, tensors, reports, exact):
    """A scan against the measures of the tensors and the reports of the whole-model functions."""
    assert scan.overall.weights == sum(tensor.numel() for tensor in tensors.values())
    every = torch.cat([tensor.flatten().double() for tensor in tensors.values() if tensor.any()])
    assert scan.overall.pqi == pytest.approx(float(torch_sap.pq_index(every)), rel=1e-13)
    assert scan.overall.gini == pytest.approx(float(torch_sap.gini_index(every)), abs=1e-12 if exact else 1e-4)
    for scope, report in reports.items():
        assert getattr(scan.overall, f"remaining_{scope}") == report.density
    assert [layer.name for layer in scan.layers] == list(tensors)
    for number, (layer, tensor) in enumerate(zip(scan.layers, tensors.values(), strict=True)):
        assert layer.shape == tuple(tensor.shape)
        if tensor.numel():
            assert layer.pqi == pytest.approx(float(torch_sap.pq_index(tensor)), rel=1e-13, nan_ok=True)
            gini = float(torch_sap.gini_index(tensor))
            assert layer.gini == pytest.approx(gini, abs=1e-12 if exact else 2e-4, nan_ok=True)
            for scope in ("layer", "neuron"):
                expected = reports[scope].tensors[number].density
                assert getattr(layer, f"remaining_{scope}") == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_is_scanned_as_memory_is_measured(tmp_path, dtype, suffix):
    values = weights(dtype)
    scan = scan_file(write(values, tmp_path / f"a{suffix}"))
    tensors = {layer.name: values[layer.name] for layer in scan.layers}
    reports = {scope: pruned_in_memory(tensors, scope, eta_r=0.1)[1] for scope in FUNCTIONS}
    assert_scan_is(scan, tensors, reports, exact=dtype.itemsize == 2)
    dead = {layer.name: layer.dead_rows for layer in scan.layers if layer.dead_rows}
    assert dead == {"body.dead.weight": 2, "head.weight": 10}
    assert scan.overall.dead_rows == 12


def test_a_model_is_scanned_as_it_is_measured():
    timm = pytest.importorskip("timm")
    model = nn.Sequential(timm.create_model("test_resnet"), nn.ConvTranspose2d(8, 6, 3, groups=2).bfloat16())
    scan = scan_model(model)
    tensors = {layer.name: dict(model.named_parameters())[layer.name].detach() for layer in scan.layers}
    reports = {scope: prune(copy.deepcopy(model), eta_r=0.1) for scope, prune in FUNCTIONS.items()}
    assert_scan_is(scan, tensors, reports, exact=False)
    for layer, record in zip(scan.layers, reports["global"].tensors, strict=True):
        assert layer.remaining_global == pytest.approx(record.density, abs=2e-3)


def test_shards_are_scanned_together(tmp_path):
    values = weights(torch.bfloat16)
    whole = scan_file(write(values, tmp_path / "a.safetensors"))
    parts = scan_file(shard(values, tmp_path / "parts"))
    assert {layer.name: layer for layer in parts.layers if layer.pqi == layer.pqi} == {
        layer.name: layer for layer in whole.layers if layer.pqi == layer.pqi
    }
    assert parts.overall == whole.overall


def test_unaligned_tensors(tmp_path):
    path = write(weights(), tmp_path / "a.safetensors")
    expected = scan_file(path)
    assert repr(scan_file(misalign(path))) == repr(expected)


def test_zeros_have_no_index():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    scan = scan_model(model)
    assert np.isnan([scan.overall.pqi, scan.overall.gini]).all()
    assert (scan.overall.remaining_global, scan.overall.remaining_layer, scan.overall.dead_rows) == (1, 1, 3)
    assert [(one.name, one.reason) for one in scan.left_out] == [("weight", "zero throughout")]
