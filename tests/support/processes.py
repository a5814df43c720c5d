"""Cases run in several processes with gloo, started once for all of them."""

import pickle
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fully_sharded import MISSING

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs the package torch with gloo", allow_module_level=True)


def run_all(rank, size, folder, cases):
    """Run cases in one process and leave the traceback of each, empty if it passed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    failures = {}
    for name, (function, *arguments) in cases.items():
        torch.manual_seed(0)
        try:
            function(*arguments)
            failures[name] = ""
        except Exception:
            failures[name] = f"process {rank}:\n{traceback.format_exc()}"
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(failures))
        dist.barrier()
    dist.destroy_process_group()


def run_processes(size, folder, cases):
    """For each process the failures of the cases that it has run.

    A process that is lost, killed or out of gloo's time, takes the others along. The case that they were in is tried
    again in new processes, with a warning; lost twice, it fails, and the cases after it run.

    Args:
        size: Number of processes.
        folder: An empty folder.
        cases: From a name to a function of a module, and its arguments.
    """
    failures, lost = [{} for _ in range(size)], None
    while left := {name: case for name, case in cases.items() if name not in failures[0]}:
        attempt = Path(tempfile.mkdtemp(dir=folder))
        reason = run_once(size, attempt, left)
        files = [attempt / f"{rank}.pickle" for rank in range(size)]
        found = [pickle.loads(file.read_bytes()) if file.exists() else {} for file in files]
        for name in left:
            of_all = [of_one.get(name) for of_one in found]
            if None in of_all and not any(of_all):  # nobody failed, and somebody did not come to its end
                break
            for of_one, text in zip(failures, of_all, strict=True):
                of_one[name] = text or ""
        else:
            break
        if name == lost:
            for of_one in failures:
                of_one[name] = f"processes were lost twice in this case: {reason}"
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("default")  # shown, not an error
                warnings.warn(f"processes were lost in {name!r}, which is tried again: {reason}", stacklevel=2)
        lost = name
    return failures


def run_once(size, folder, cases):
    """Run cases in new processes; returns why they ended, None if they came to the end."""
    running = torch.multiprocessing.spawn(run_all, (size, folder, cases), nprocs=size, join=False)
    try:
        while not running.join():
            pass
    except Exception as error:
        return str(error)
    return None


def assert_passed(failures, case):
    """Show what happened to a case in every process where it failed."""
    if all(MISSING in of_one.get(case, "") for of_one in failures):
        pytest.skip("needs PyTorch 2.6 or newer, which has FSDP2 for CPUs")
    found = [of_one[case] for of_one in failures]
    assert not any(found), "\n".join(found)
