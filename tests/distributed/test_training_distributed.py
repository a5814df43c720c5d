"""timm models in DDP and FSDP2 with two processes: the training of one process, masked by hand."""

import pytest
from processes import assert_passed, run_processes

from training_cases import CASES  # isort: skip  # after processes, which skips where there is no gloo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_processes(2, tmp_path_factory.mktemp("processes"), CASES)


@pytest.mark.parametrize("case", CASES)
def test_processes(failures, case):
    assert_passed(failures, case)
