"""Cases run in several processes with gloo, started once for all of them."""

import pickle
import traceback
from datetime import timedelta

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

    Args:
        size: Number of processes.
        folder: An empty folder.
        cases: From a name to a function of a module, and its arguments.
    """
    running = torch.multiprocessing.spawn(run_all, (size, folder, cases), nprocs=size, join=False)
    try:
        while not running.join():
            pass
    except Exception:  # what was left behind says which case it was
        traceback.print_exc()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def assert_passed(failures, case):
    """Show what happened to a case in every process where it failed."""
    if all(MISSING in of_one.get(case, "") for of_one in failures):
        pytest.skip("needs PyTorch 2.6 or newer, which has FSDP2 for CPUs")
    found = [of_one.get(case, "a process did not get to this case") for of_one in failures]
    assert not any(found), "\n".join(found)
