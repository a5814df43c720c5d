"""Cases of test_distributed.py for DistributedDataParallel, and for copies that differ."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
from distributed_models import data, mine, mlp
from fully_sharded import fully_shard
from helpers import FUNCTIONS, SCOPES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import torch_sap
from torch_sap import scores


def data_parallel():
    model = DistributedDataParallel(mlp())
    assert list(torch_sap.layer_unstructured(model).groups) == ["0.weight", "2.weight", "4.weight"]
    stepper = torch_sap.SAP(model, rewind=model.module.state_dict())
    torch_sap.SAP(model, rewind=model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        optimizer.zero_grad()
        model(mine(data() + number)).square().mean().backward()
        pruned = [(model.module[i].weight, model.module[i].weight_mask) for i in (0, 2, 4)]
        assert all(torch.count_nonzero(weight.grad[~mask]) == 0 for weight, mask in pruned)
        optimizer.step()
        assert all(torch.count_nonzero(weight[~mask]) == 0 for weight, mask in pruned)
        stepper.step()
    assert list(torch_sap.dense_state_dict(model)) == list(mlp().state_dict())
    torch_sap.remove(model)


def scores_of_all_batches():
    """Each process scores on a batch of its own, and all prune by the sums: as one process does with all batches."""
    for score, scope in itertools.product(
        (
            scores.activations,
            lambda batches: scores.gradients(batches, lambda model, x: model(x).square().sum()),
        ),
        SCOPES,
    ):
        one, many = mlp(), DistributedDataParallel(mlp())
        settings = {"scope": scope, "eta_r": 0.3, "rewind": "none"}
        alone = torch_sap.SAP(one, importance_scores=score([data()]), **settings)
        together = torch_sap.SAP(many, importance_scores=score([mine(data())]), **settings)
        for _ in range(2):
            alone.step()
            together.step()
            for a, b in zip(one.buffers(), many.module.buffers(), strict=True):
                assert torch.equal(a, b)
        assert alone.history[0].pruned_count > 0
        function = FUNCTIONS[scope]
        assert function(mlp(), eta_r=0.3, importance_scores=score([data()])).pruned == alone.history[0].pruned_count


def a_wrapper_is_gone_with_its_function():
    """Without the collector: a wrapper that lives on keeps gloo's threads, which can abort a process that ends."""

    def train():
        model = DistributedDataParallel(mlp())
        sap = torch_sap.SAP(model)
        for _ in range(2):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            model(mine(data())).square().mean().backward()
            optimizer.step()
            sap.step()
        sap.record()
        return weakref.ref(model), weakref.ref(model.module[0].weight)

    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in train()] == [None, None]
    finally:
        gc.enable()


def processes_disagree():
    model = DistributedDataParallel(mlp())
    stepper = torch_sap.SAP(DistributedDataParallel(mlp()), rewind="none")
    for broken in (model.module, stepper.model.module):
        if dist.get_rank():
            broken[0].weight.data[:3] *= 3
    for prune in (lambda: torch_sap.layer_unstructured(model), stepper.step):
        with pytest.raises(RuntimeError, match="weights differ"):
            prune()
    assert "weight" in model.module[0]._parameters
    if dist.get_rank() == 0:
        torch_sap.layer_unstructured(mlp())  # plain, on one process: it waits for no other
    if dist.get_world_size() == 2:
        copies = mlp()
        fully_shard(copies, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard")))
        torch_sap.layer_unstructured(copies)
        if dist.get_rank():
            with torch.no_grad():
                copies[0].weight.to_local()[:3].mul_(3)
        with pytest.raises(RuntimeError, match="weights differ"):
            torch_sap.layer_unstructured(copies)


def wrapped_after_sap():
    """Each process starts from weights of its own; the first one's count, as DistributedDataParallel has it."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2, dtype=torch.double))
    model.to(torch.double, memory_format=torch.channels_last)
    stepper = torch_sap.SAP(model, scope="layer")
    start = {name: value.clone() for name, value in model.named_parameters()}
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped(torch.randn(4, 3, 8, 8, dtype=torch.double)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        stepper.step()
        assert dist.get_rank() or all(torch.equal(p, start[name] * (p != 0)) for name, p in model.named_parameters())
        for name, value in model.state_dict().items():
            everywhere = [torch.empty_like(value).contiguous() for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, value.contiguous())
            assert all(torch.equal(value, other) for other in everywhere), name
    with torch.no_grad():
        model[0].weight[:3] *= 1 + dist.get_rank()
    with pytest.raises(RuntimeError, match="weights differ"):
        stepper.step()
