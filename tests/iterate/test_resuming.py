"""A run that is killed at any instant and resumed arrives bit for bit where an uninterrupted one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "killed_runs.py"
pytest.importorskip("sklearn")


def killed(what, folder, *arguments):
    command = [sys.executable, SCRIPT, what, folder, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal(found, number):
    assert len(found["results"]) == number
    assert [result == found["whole"] for result in found["results"]] == [True] * number
    assert found["whole"]["rounds"] == 4
    assert found["whole"]["density"] < 0.9


@pytest.mark.parametrize("number", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_instants(number, tmp_path):
    found = killed("instants", tmp_path, number)
    assert_equal(found, number)
    assert found["kills"] >= number * 0.9
    assert len(found["places"]) >= 3, "spread over the run"
    print(found["kills"], "kills of", number, "runs of", found["seconds"], "s:", found["places"])


@pytest.mark.slow
def test_killed_at_each_step_of_each_writing(tmp_path):
    found = killed("steps", tmp_path)
    assert_equal(found, 8 * 9)
    assert sum(found["places"].values()) == 8 * 9
    print(found["places"])
