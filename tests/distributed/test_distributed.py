"""Several processes give what one gives: FSDP2, DTensor and DDP with gloo, started once a number of processes."""

import pytest
from processes import assert_passed, run_processes

from distributed_cases import CASES  # isort: skip  # after processes, which skips where there is no gloo


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="{} processes".format)
def failures(request, tmp_path_factory):
    return run_processes(request.param, tmp_path_factory.mktemp("processes"), CASES)


@pytest.mark.parametrize("case", CASES)
def test_processes(failures, case):
    if case.startswith("standardized"):
        pytest.importorskip("timm")
    assert_passed(failures, case)
