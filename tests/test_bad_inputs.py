"""Every row of the table of bad inputs: the error to the letter, and nothing that is changed by it.

python tests/test_bad_inputs.py     writes docs/bad-inputs.md from the rows
"""

import ast
import importlib.util
from pathlib import Path

import pytest
from bad_input_world import SAPCallback, make_world, state_of
from bad_inputs import CASES

import torch_sap

PAGE = Path(__file__).parents[1] / "docs" / "bad-inputs.md"
HEAD = """# Bad inputs

What a wrong call raises, and what it leaves behind: nothing. `tests/test_bad_inputs.py` makes each call, compares
error and message to the letter, and then compares with how it was before: the state_dict of every model (bits), its
Parameter objects, gradients, hooks and train modes, the rounds and the rewind point of every pruner, and the files.
`python tests/test_bad_inputs.py` writes this page from the same rows.

In the calls, `model` is a small network, `pruned` one that was pruned and trained for a step, `with_nan` one with a NaN
among its weights, `integers` a module with an integer weight, `layer` an `nn.Linear(6, 9)`, `sap` an `SAP` pruner
after one round, `unrewound` one with `rewind="none"`, `history` the history of one round, `raising` a training that
changes weights and then raises.
"""


def write_page():
    lines = [HEAD]
    for title, cases in CASES.items():
        lines += [f"## {title}", "", "| call | error | message | state afterwards |", "|---|---|---|---|"]
        for call, error, message in cases:
            shown = message.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
            lines.append(f"| `{call}` | {error} | {shown} | unchanged |")
        lines.append("")
    return "\n".join(lines)


ROWS = [row for cases in CASES.values() for row in cases]


@pytest.mark.parametrize(("call", "error", "message"), ROWS, ids=[row[0] for row in ROWS])
def test_refused_by_name_and_nothing_is_changed(call, error, message, tmp_path):
    if call.startswith("SAPCallback") and SAPCallback is None:
        pytest.skip("needs the package lightning")
    if call.startswith("shrink(") and importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("needs the package torch_pruning")
    world = make_world(tmp_path)
    before = state_of(world, tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # its type and text are compared below
        eval(call, world)
    text = str(caught.value).replace(str(tmp_path), "FOLDER")
    found = " ".join(text.split())  # PyTorch 2.5 has more blanks in one of its own
    assert (type(caught.value).__name__, found) == (error, message)
    after = state_of(world, tmp_path)
    for name, value in before.items():
        assert repr(after[name]) == repr(value), name
    assert after.keys() == before.keys()


def test_the_page_is_the_one_of_these_rows():
    assert len(ROWS) >= 40
    assert PAGE.read_text(encoding="utf-8") == write_page()


def test_every_public_function_and_class_that_takes_arguments_has_a_row():
    used = {node.id for call, *_ in ROWS for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Name)}
    results = {
        "PruningReport",
        "Round",
        "Verification",
        "VerifiedWeight",
        "Summary",
        "LayerSummary",
        "Shrunk",
    }  # made by the library, not by users
    assert set(torch_sap.__all__) - results <= used


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
