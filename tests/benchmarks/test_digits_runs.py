"""benchmarks/digits_runs.py: it makes the folders that docs/command-line.md reports."""

from pathlib import Path

import pytest

import torch_sap

pytest.importorskip("sklearn")

import digits_runs

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "runs"


def test_it_makes_the_committed_runs(tmp_path):
    digits_runs.main(tmp_path)
    for name in ("digits-global", "digits-layer"):
        made, committed = (torch_sap.History.from_json(root / name / "history.json") for root in (tmp_path, COMMITTED))
        for ours, theirs in zip(made, committed, strict=True):
            assert ours.density == pytest.approx(theirs.density, abs=0.02)
            assert ours.metrics["accuracy"] == pytest.approx(theirs.metrics["accuracy"], abs=0.05)
        assert (tmp_path / name / "config.json").read_text() == (COMMITTED / name / "config.json").read_text()
