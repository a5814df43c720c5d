"""The notebook of the site runs, and shows what it was saved with."""

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_and_prunes_nine_tenths_within_two_points(tmp_path, monkeypatch, capsys):
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # of this process
    names = {}
    with matplotlib.rc_context({"backend": "Agg"}):
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code {number}", "exec"), names)
        pyplot.close("all")
    history = names["history"]
    best = history[history.returned]
    assert best.density < 0.15
    assert best.metrics["accuracy"] > history[0].metrics["accuracy"] - 0.02 - 1e-9
    assert names["accuracy"](names["model"]) == best.metrics["accuracy"], "the model is that of the round"
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        line.split(":")[0] for cell in CODE for output in cell["outputs"] for line in output.get("text", [])
    ], "what was saved is the output of this code"


def test_every_cell_was_saved_with_its_output_and_without_an_error():
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), "run from top to bottom"
    assert NOTEBOOK.stat().st_size < 300_000
