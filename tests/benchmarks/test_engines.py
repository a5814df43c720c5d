"""benchmarks/engines.py: the page shows the committed results, and what an engine computes is compared."""

import csv

import pytest
import torch

pytest.importorskip("timm")

import engines
from pages import fill


def test_the_page_shows_the_committed_results():
    with open(engines.RESULTS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["engine"] for row in rows} == set(engines.ENGINES)
    page = engines.PAGE.read_text(encoding="utf-8")
    assert fill(page, {"engines": engines.table_of(rows)}) == page
    text = " ".join(page.split())
    assert [row for row in rows if row["version"] not in text or row["date"] not in text] == []


@torch.inference_mode()
def test_sizes_follow_the_zeros_where_they_are_left_out():
    rows = engines.measure(["PyTorch", "PyTorch, CSR weights", "`save_sparse`"], 0.0, (64, 128, 64))
    sizes = {name: [row["bytes"] for row in rows if row["engine"] == name] for name in ("PyTorch", "`save_sparse`")}
    assert max(sizes["PyTorch"]) == min(sizes["PyTorch"])
    assert sizes["`save_sparse`"][2] < 0.3 * sizes["PyTorch"][2]
    assert all(row["milliseconds_64"] > 0 for row in rows if row["engine"] != "`save_sparse`")


@torch.inference_mode()
def test_an_engine_that_computes_otherwise_is_noticed(monkeypatch):
    monkeypatch.setitem(
        engines.ENGINES, "PyTorch", ("torch", lambda model, example, folder: (1, lambda x: model(x) + 1))
    )
    with pytest.raises(AssertionError, match="not close"):
        engines.measure(["PyTorch"], 0.0, (64, 128, 64))
