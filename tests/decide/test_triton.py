"""The backend for GPUs, without one: its kernels under Triton's interpreter and through Triton's compiler."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_sap
from torch_sap.decide import triton_backend
from torch_sap.decide.backends import NUMPY, TORCH
from torch_sap.decide.groups import Entry
from torch_sap.decide.triton_backend import backend_of

SUPPORT = Path(__file__).parents[1] / "support"


def skip_without_triton():
    triton = pytest.importorskip("triton")
    if triton_backend.is_too_old(triton.__version__):
        pytest.skip("needs PyTorch 2.9 or newer, whose Triton the kernels are written for")


def run_apart(command, **environment):
    """Run Python in a process of its own: Triton reads its environment when it is imported."""
    package = str(Path(torch_sap.__file__).parents[1])
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package, **environment}
    return subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sample", "launches", "not sample and not launches"])
def test_the_kernels_give_what_the_cpu_gives(part):
    skip_without_triton()
    cases = SUPPORT / "triton_cases.py"
    done = run_apart(["-m", "pytest", "-o", "addopts=", "-q", "-k", part, str(cases)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there():
    skip_without_triton()
    done = run_apart([str(SUPPORT / "compile_kernels.py")], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-1] == "kernels"
    assert int(done.stdout.split()[-2]) > 10


def test_tensors_on_the_cpu_are_never_sent_to_a_kernel():
    assert backend_of([Entry("w", torch.ones(2, 2))]) is NUMPY
    assert not triton_backend.usable(torch.device("cpu"))


def test_tensors_without_an_address_go_to_pytorch(monkeypatch):
    monkeypatch.setattr(triton_backend, "usable", lambda device: True)
    with FakeTensorMode():
        assert backend_of([Entry("w", torch.empty(2, 2, device="meta"))]) is TORCH


def test_a_device_without_triton_goes_to_pytorch(monkeypatch):
    class OnDevice:
        is_cpu, device = False, torch.device("meta")

    monkeypatch.setattr(triton_backend, "Tensor", OnDevice)
    entries = [Entry("w", OnDevice())]
    monkeypatch.setattr(triton_backend, "usable", lambda device: True)
    assert backend_of(entries) is triton_backend.TRITON
    monkeypatch.setattr(triton_backend, "usable", lambda device: False)
    assert backend_of(entries) is TORCH


@pytest.mark.parametrize("version", ["3.4.0", "3.9.0+git1234"])
def test_a_kernel_that_does_not_run_is_given_up(version, monkeypatch, caplog):
    """No C compiler, say, for which Triton raises errors of many kinds; and a Triton that is too old."""

    def fails(*arguments, **constants):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(triton_backend, "import_kernels", lambda: SimpleNamespace(store_zeros=None))
    ones, zeros = torch.ones, torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_backend, "find_spec", bool)
    monkeypatch.setattr(triton_backend, "run", fails)
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **more: ones(*shape, **more))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: zeros(*shape, **more))
    monkeypatch.setattr(triton_backend, "send", lambda arrays, device: arrays)
    triton_backend.usable.cache_clear()
    with caplog.at_level("INFO", logger=triton_backend.__name__):
        assert not triton_backend.usable(torch.device("cuda", 7))
    triton_backend.usable.cache_clear()
    assert ("Triton 3.4.0 is older" if version == "3.4.0" else "C compiler") in caplog.text
