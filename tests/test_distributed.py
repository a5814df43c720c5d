"""Several processes give what one gives: FSDP2, DTensor and DDP with gloo, started once a number of processes."""

import pickle
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("FSDP2 needs torch 2.6 or newer", allow_module_level=True)

from distributed_cases import CASES  # noqa: E402


def run_all(rank, size, folder):
    """Run the cases in one process and leave the traceback of each, empty if it passed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    failures = {}
    for name, (function, *arguments) in CASES.items():
        torch.manual_seed(0)
        try:
            function(*arguments)
            failures[name] = ""
        except Exception:
            failures[name] = f"process {rank}:\n{traceback.format_exc()}"
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(failures))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def failures(request, tmp_path_factory):
    """For each process the failures of the cases that it has run."""
    folder = tmp_path_factory.mktemp("processes")
    running = torch.multiprocessing.spawn(run_all, (request.param, folder), nprocs=request.param, join=False)
    try:
        while not running.join():
            pass
    except Exception:  # what was left behind says which case it was
        traceback.print_exc()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_processes(failures, case):
    found = [of_one.get(case, "a process did not get to this case") for of_one in failures]
    assert not any(found), "\n".join(found)
