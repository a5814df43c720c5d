"""Counts and their shares."""

import math

from helpers import mlp

import torch_sap
from torch_sap.masks.parameters import LeftOut
from torch_sap.records.report import PruningReport, TensorRecord


def test_shares_of_tensors_and_of_reports():
    tensors = (TensorRecord("a", (2, 4), 2, 8), TensorRecord("b", (1, 2), 0, 2), TensorRecord("c", (0, 2), 0, 0))
    report = PruningReport("layer", {}, {}, tensors)
    assert (report.total, report.remaining, report.density, report.sparsity) == (10, 2, 0.2, 0.8)
    assert (report.compression_ratio, tensors[0].compression_ratio, tensors[1].compression_ratio) == (5, 4, math.inf)
    assert math.isnan(tensors[2].density)
    assert math.isnan(tensors[2].sparsity)


def test_a_round_and_a_report_of_the_same_pruning_agree():
    report, sap = torch_sap.layer_unstructured(mlp()), torch_sap.SAP(mlp())
    found = sap.step()
    assert found.tensors_after == report.tensors
    assert found.pruned_count == report.pruned
    assert report.to_dict()["tensors"] == found.to_dict()["tensors_after"]
    assert report.to_dict()["groups"] == found.to_dict()["groups"]
    assert str(report).splitlines()[0].startswith("layer scope: pruned ")


def test_a_report_says_what_remains_and_what_is_left_out_in_text_and_in_a_notebook():
    tensors = (TensorRecord("a<b>", (2, 4), 2, 8), TensorRecord("c", (4, 1), 4, 4))
    left_out = [LeftOut("d", (2, 2), "excluded"), LeftOut("e", (2, 2), "excluded"), LeftOut("f", (2, 2), "a bias")]
    report = PruningReport("layer", {}, {}, tensors, left_out)
    note = "left out: d and 1 more (excluded), f (a bias)"
    lines = str(report).splitlines()
    assert lines[0] == "layer scope: pruned 0, 6 of 12 weights remain (50.0%)"
    assert lines[-1] == f"  {note}"
    shown = report._repr_html_()
    assert "<td>a&lt;b&gt;</td><td>(2, 4)</td><td>8</td><td>2</td><td>25.0</td>" in shown
    assert shown.startswith(f"<p>{lines[0]}</p>")
    assert shown.endswith(f"<p>{note}</p>")
