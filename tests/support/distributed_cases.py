"""Cases of test_distributed.py, run in every process: models on several processes against one process."""

import copy
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_copies import (
    a_wrapper_is_gone_with_its_function,
    data_parallel,
    processes_disagree,
    scores_of_all_batches,
    wrapped_after_sap,
)
from distributed_models import assert_same_model, assert_same_report, data, full_state, mine, mlp, shard, step_alike
from distributed_standardized import standardized_convolutions
from fully_sharded import MixedPrecisionPolicy, fully_shard
from helpers import FUNCTIONS, SCOPES, of_package
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import torch_sap


def pruned_and_trained_as_on_one_process(scope, order):
    for make in (
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    ):
        one, many = mlp(), mlp()
        if order == "shard, prune":
            shard(many)
        assert_same_report(FUNCTIONS[scope](many), FUNCTIONS[scope](one))
        if order == "prune, shard":
            shard(many)
        optimizers = make(one), make(many)
        for _ in range(2):
            for _ in range(2):
                step_alike(one, many, optimizers, data())
            assert_same_report(FUNCTIONS[scope](many), FUNCTIONS[scope](one), rounding=1e-5)  # of the training


def ties_types_and_dimensions(scope, types=(torch.float16, torch.bfloat16, torch.float32, torch.float64)):
    """Weights of few values, or of one, cut along rows and columns, in every floating-point type."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype in types:
        for levels in (0, 1, 3, 1000):
            torch.manual_seed(1)
            one = nn.Sequential(
                nn.Linear(9, 6), nn.Linear(6, 8), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv2d(3, 4, 3)
            )
            for parameter in one.to(dtype).parameters():
                parameter.data = (torch.randn(parameter.shape) * levels).round().add(0.25).to(dtype)
            many = copy.deepcopy(one)
            for layer, dim in ((many[0], 1), (many[1], 0), (many[2], 0)):  # many[3] stays plain
                layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(dim)]))
            for _ in range(2):
                assert_same_report(FUNCTIONS[scope](many, eta_r=0.5), FUNCTIONS[scope](one, eta_r=0.5))
                assert_same_model(many, one)


def ties_on_a_device(scope):
    """The computation of other devices, on this one: no numpy, and thresholds that stay tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_sap.decide.step, torch_sap.decide.sums):
            patch.setattr(module, "backend_of", lambda entries: torch_sap.decide.backends.TORCH)
        ties_types_and_dimensions(scope, [torch.bfloat16, torch.float32])


def stacks_of_experts(scope):
    """Stacks cut between matrices and inside them, with matrices stored both ways, and experts in two dimensions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim, columns in ((0, False), (0, True), (1, False), (2, True)):
        torch.manual_seed(2)
        one = of_package("transformers", "Experts", up_proj=torch.randn(5, 4, 6), is_transposed=columns)
        one.glu = of_package("transformers", "DbrxExpertGLU", w1=torch.randn(10, 3), moe_num_experts=5)
        many = copy.deepcopy(one)
        many.up_proj = nn.Parameter(distribute_tensor(many.up_proj.data, mesh, [Shard(dim)]))
        many.glu.w1 = nn.Parameter(distribute_tensor(many.glu.w1.data, mesh, [Shard(0)]))
        for _ in range(3):
            assert_same_report(FUNCTIONS[scope](many, eta_r=0.3), FUNCTIONS[scope](one, eta_r=0.3))
            assert_same_model(many, one)


def no_weight_travels():
    sent = []
    real = dist.all_gather

    def counted(received, tensor, **kwargs):
        sent.append(tensor.numel())
        real(received, tensor, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted)
        for scope in SCOPES:
            FUNCTIONS[scope](shard(nn.Sequential(nn.Linear(500, 12), nn.ReLU(), nn.Linear(12, 300))))
    assert sent
    assert max(sent) < 1000, sent  # 9600 weights; in the neuron scope three numbers for each of 312 rows


def importance_scores():
    one, many = mlp(), shard(mlp())
    for model in (one, many):
        scores = {(model[0], "weight"): torch.arange(77.0).view(11, 7)}
        torch_sap.layer_unstructured(model, importance_scores=scores)
    assert_same_model(many, one)


def errors_reach_every_process():
    model = shard(mlp())
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            model[0].weight.to_local().view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight of shape \(11, 7\) has NaN"):
        torch_sap.global_unstructured(model)
    assert "weight" in model[0]._parameters
    with pytest.raises(NotImplementedError, match="gini needs whole tensors"):
        torch_sap.SAP(shard(mlp()), gini=True)
    with pytest.raises(TypeError, match="full_tensor"):
        torch_sap.pq_index(shard(mlp())[0].weight)
    if dist.get_world_size() == 2:
        mesh = init_device_mesh("cpu", (1, 2))
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(DTensor.from_local(layer.weight.data, mesh, [Shard(0), Shard(0)]))
        torch_sap.global_unstructured(layer)  # one of the two dimensions has one process


def stepper_and_rewinding():
    one, many = mlp(), shard(mlp())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in (one, many)]
    steppers = [torch_sap.SAP(m, scope="global", optimizer=o) for m, o in zip((one, many), optimizers, strict=True)]
    for _ in range(3):
        rounds = []
        for stepper, batch in zip(steppers, (data(), mine(data())), strict=True):
            for _ in range(2):
                stepper.starts.optimizer.zero_grad()
                stepper.model(batch).square().mean().backward()
                stepper.starts.optimizer.step()
            rounds.append(stepper.step(eval_fn=lambda model: model(data()).square().mean().item()))
        assert rounds[0].tensors_after == rounds[1].tensors_after
        assert abs(rounds[0].pruned_metrics["metric"] - rounds[1].pruned_metrics["metric"]) < 1e-6
        assert_same_model(many, one)
    steppers[1].set_rewind_point()
    steppers[1].load_state_dict(steppers[1].state_dict())
    fresh = torch_sap.SAP(shard(mlp()), scope="global")
    with pytest.raises(ValueError, match="load the model's state first"):
        fresh.load_state_dict(steppers[1].state_dict())
    fresh.model.load_state_dict(many.state_dict())
    fresh.load_state_dict(steppers[1].state_dict())
    fresh.load_state_dict(fresh.state_dict())
    torch_sap.SAP(many, rewind=mlp().state_dict())
    torch_sap.remove(many)
    assert list(many.state_dict()) == list(mlp().state_dict())
    many(data()).sum().backward()


def states_are_loaded(order):
    pruned = shard(mlp())
    torch_sap.layer_unstructured(pruned)
    state = {key: value.clone() for key, value in pruned.state_dict().items()}
    other = mlp()
    if order == "shard, prune":
        shard(other)
    torch_sap.SAP(other)
    if order == "prune, shard":
        shard(other)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(data()), pruned(data()))
    plain = mlp()
    torch_sap.SAP(plain)
    plain.load_state_dict(get_model_state_dict(pruned, options=StateDictOptions(full_state_dict=True)))
    assert_same_model(pruned, plain)


def plain_states(order):
    model = mlp()
    if order == "shard, prune":
        shard(model)
    torch_sap.layer_unstructured(model)
    if order == "prune, shard":
        shard(model)
    for gathered in (False, True):
        if gathered:
            model(data())
        state = torch_sap.dense_state_dict(model)
        assert list(state) == list(mlp().state_dict())
        assert all(isinstance(value, DTensor) for value in state.values())
    one = mlp()
    torch_sap.layer_unstructured(one)
    expected = torch_sap.remove(one).state_dict()
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    dcp.save({"model": state}, checkpoint_id=path[0])
    found = {"model": mlp().state_dict()}
    dcp.load(found, checkpoint_id=path[0])
    for key, value in expected.items():
        assert torch.equal(state[key].full_tensor(), value), key
        assert torch.equal(found["model"][key], value), key
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path[0])


def a_forward_never_sees_what_was_written(order):
    model = mlp()
    if order == "shard, prune":
        shard(model)
    torch_sap.global_unstructured(model)
    if order == "prune, shard":
        shard(model)
    for _ in range(3):
        expected = model(data()).detach()
        model.reshard()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.to_local().masked_fill_(parameter.to_local() == 0, 100.0)
        found = model(data())
        assert torch.equal(found, expected)
        found.sum().backward()


class Attention(nn.Module):
    """A module that reads the weight of one inside it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(lambda x: self.attention(x, x, x, need_weights=False)[0], x, use_reentrant=False))


def weights_read_without_calling(order):
    torch.manual_seed(4)
    x = torch.randn(2, 3, 8)
    for inner in ([], ["attention"]):
        torch.manual_seed(0)
        one = Attention()
        many = copy.deepcopy(one)
        losses = []
        for model in (one, many):
            for step in order.split(", "):
                if step == "prune":
                    torch_sap.layer_unstructured(model)
                elif model is many:
                    for name in inner:
                        fully_shard(model.get_submodule(name))
                    fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                losses.append(model(x).square().mean())
                losses[-1].backward()
                optimizer.step()
        torch.testing.assert_close(torch.stack(losses[:3]), torch.stack(losses[3:]))


def mixed_precision_and_accumulation(order):
    model = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(1, 5))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for step in order.split(", "):
        if step == "prune":
            torch_sap.global_unstructured(model)
        else:
            fully_shard(model[0], mp_policy=policy)
            fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        for sync in (False, True):
            model.set_requires_gradient_sync(sync)
            model(mine(data())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state = full_state(model)
        for key, mask in state.items():
            if key.endswith("_mask"):
                assert torch.count_nonzero(state[key.replace("_mask", "_orig")][~mask]) == 0


def converted(order):
    """``model.to(dtype)`` before the first forward swaps the tensors of DTensors, and the hooks of their gradients.

    Gradients are masked from the first backward on, whatever came first.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = mlp()
        for step in order.split(", "):
            if step == "prune":
                torch_sap.layer_unstructured(model, eta_r=0.3)
            else:
                shard(model)
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            model(mine(data()).to(dtype)).sum().backward()
            state = full_state(model)
            for name, parameter in model.named_parameters():
                if name.endswith("_orig"):
                    gradient, mask = parameter.grad.full_tensor(), state[name.replace("_orig", "_mask")]
                    assert gradient.dtype == dtype
                    assert not mask.all()
                    assert gradient.any()
                    assert not gradient[~mask].any()
            optimizer.step()
            optimizer.zero_grad()


ORDERS = ("shard, prune", "prune, shard")
CASES = {
    **{f"training {s} {o}": (pruned_and_trained_as_on_one_process, s, o) for s in SCOPES for o in ORDERS},
    **{f"ties {s}": (ties_types_and_dimensions, s) for s in SCOPES},
    **{f"stacks of experts {s}": (stacks_of_experts, s) for s in SCOPES},
    **{f"ties on a device {s}": (ties_on_a_device, s) for s in SCOPES},
    **{
        f"{function.__name__} {order}": (function, order)
        for order in ORDERS
        for function in (
            states_are_loaded,
            plain_states,
            a_forward_never_sees_what_was_written,
            weights_read_without_calling,
            mixed_precision_and_accumulation,
            standardized_convolutions,
            converted,
        )
    },
    **{
        function.__name__: (function,)
        for function in (
            no_weight_travels,
            importance_scores,
            errors_reach_every_process,
            stepper_and_rewinding,
            data_parallel,
            processes_disagree,
            scores_of_all_batches,
            wrapped_after_sap,
            a_wrapper_is_gone_with_its_function,
        )
    },
}
