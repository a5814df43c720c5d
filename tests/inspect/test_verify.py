"""verify tells what operations receive of pruned weights, and leaves the model as it was."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_unchanged, bits, mlp, snapshot
from torch import nn
from torch.nn.utils import prune, spectral_norm
from weighted import Weighted, vector

import torch_sap
from torch_sap import verify

REASONS = {
    "standardised weight (native_batch_norm)": lambda m, w, x: F.linear(
        x, F.batch_norm(w.view(1, 8, 8), None, None, training=True)[0]
    ),
    "standardised weight (native_layer_norm)": lambda m, w, x: F.linear(x, F.layer_norm(w, (8,))),
    "standardised weight (div, sub)": lambda m, w, x: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std()),
    "re-parametrised (add)": lambda m, w, x: F.linear(x, w * 2 + m.other),
    "re-parametrised (exp)": lambda m, w, x: F.linear(x, w.exp()),
    "not used": lambda m, w, x: x,
    "zeros among unpruned entries": lambda m, w, x: F.linear(x, w * (m.other > 1)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    model = nn.Sequential(Weighted(REASONS[reason]), nn.Linear(8, 2))
    torch_sap.layer_unstructured(model, gamma=3.0)
    found = verify(model, vector())
    assert [(weight.name, weight.module, weight.reason) for weight in found.differing] == [
        ("0.weight", "Weighted", reason)
    ]
    pruned = int((~model[0].weight_mask).sum())
    revives = reason.startswith(("standardised", "re-"))
    assert found.weights[0].revived == (pruned if revives else 0)
    assert found.effective != revives
    assert (found.weights[0].effective_sparsity is None) == (reason == "not used")
    assert "1 received with another sparsity" in str(found)
    assert reason in str(found)


def test_a_parameter_read_behind_pytorchs_mask():
    model = Weighted(lambda m, w, x: F.linear(x, m.weight_orig))
    prune.random_unstructured(model, "weight", amount=0.5)
    (weight,) = verify(model, vector()).weights
    assert (weight.mask_sparsity, weight.effective_sparsity) == (0.5, 0.0)
    assert weight.reason == "read without the mask"


def test_pytorchs_mask_does_not_reach_the_other_user_of_a_shared_weight_and_ours_does():
    def tied():
        model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
        return model

    theirs, ours = tied(), tied()
    prune.random_unstructured(theirs[0], "weight", amount=0.5)
    torch_sap.layer_unstructured(ours)
    (weight,) = verify(theirs, torch.arange(8)).weights
    assert weight.reason == "shared with a module that is not masked"
    assert weight.effective_sparsity == pytest.approx(0.25, abs=0.01)
    assert verify(ours, torch.arange(8)).effective


def test_old_spectral_norm_keeps_zeros():
    model = nn.Sequential(spectral_norm(nn.Linear(8, 8)))
    torch_sap.layer_unstructured(model)
    found = verify(model, vector())
    assert [weight.name for weight in found.weights] == ["0.weight_orig"]
    assert found.effective
    assert not found.differing


def test_zeros_of_a_removed_model_count_as_pruned():
    model = mlp()
    report = torch_sap.layer_unstructured(model)
    torch_sap.remove(model)
    found = verify(model, torch.randn(3, 6))
    sparsity = {tensor.name: 1 - tensor.remaining / tensor.total for tensor in report.tensors}
    assert {weight.name: weight.effective_sparsity for weight in found.weights} == pytest.approx(sparsity)


def test_weights_that_are_not_pruned_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch_sap.layer_unstructured(model, exclude="1")
    assert [weight.name for weight in verify(model, vector()).weights] == ["0.weight"]


class Restless(nn.Module):
    """Changes all that a forward can change, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("latest", torch.full((1,), float("nan")))
        self.cache = None

    def forward(self, x):
        self.calls += 1
        self.latest = x.mean().view(1)
        self.cache = x
        return self.dropout(self.norm(self.linear(x))) + torch.rand_like(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_it_was(fails):
    model = Restless().train()
    model.dropout.eval()
    torch_sap.layer_unstructured(model)
    before, calls, rng = snapshot(model), model.calls, torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            verify(model, vector(5))
    else:
        generator = torch.Generator().manual_seed(1)
        verify(model, torch.randn(3, 8, generator=generator))
        assert torch.equal(torch.get_rng_state(), rng)
    assert_unchanged(model, before)
    assert model.cache is None
    assert model.calls is calls
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tensor_that_pytorchs_hook_computed_stays():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    weight = model[0].weight
    verify(model, torch.randn(3, 6))
    assert model[0].weight is weight
    model(torch.randn(3, 6)).sum().backward()


def test_training_goes_on_as_without_verify():
    results = []
    for asked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
        torch_sap.layer_unstructured(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = vector()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            if asked:
                verify(model, x)
            optimizer.step()
        results.append([bits(value) for value in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_model_is_computed_eagerly():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Weighted(REASONS["re-parametrised (add)"]))
    torch_sap.layer_unstructured(model)
    model(vector())
    compiled = torch.compile(model, backend="eager")
    compiled(vector())
    found = verify(compiled, vector())
    assert [weight.reason for weight in found.weights] == ["", "re-parametrised (add)"]
    assert found.weights[0].effective_sparsity == found.weights[0].mask_sparsity


def test_the_model_is_in_eval_mode_without_gradients():
    def function(module, weight, x):
        assert not torch.is_grad_enabled()
        return x if module.training else F.linear(x, weight)

    model = Weighted(function).train()
    torch_sap.layer_unstructured(model)
    assert not verify(model, vector()).differing
    assert model.training


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_modules_of_torchscript_get_their_mode_back():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Dropout()))
    torch_sap.layer_unstructured(model)
    verify(model.train(), vector())
    assert [module.training for module in model] == [True, True]


@pytest.fixture
def one_process(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs the package torch with gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_of_data_parallel_the_module_inside_is_verified():
    parallel = nn.parallel.DistributedDataParallel(mlp())
    torch_sap.layer_unstructured(parallel)
    parallel.forward = None  # it exchanges buffers, for which the other processes would have to be there
    found = verify(parallel, torch.randn(3, 6))
    assert [weight.name for weight in found.weights] == ["0.weight", "3.weight"]
    assert found.effective


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
    torch_sap.layer_unstructured(model)
    with pytest.raises(NotImplementedError, match=r"weight is sharded \(a DTensor\)"):
        verify(model, vector())


def test_examples_are_tensors_arguments_or_keywords():
    model = nn.MultiheadAttention(8, 2)
    torch_sap.layer_unstructured(model)
    query, key = vector(), vector()
    by_position = verify(model, (query, key, key))
    assert by_position == verify(model, {"query": query, "key": key, "value": key})
    assert by_position.effective


def test_records_are_frozen_plain_values():
    model = mlp()
    torch_sap.layer_unstructured(model)
    found = verify(model, torch.randn(3, 6))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["effective"] is True
    assert torch_sap.Verification(tuple(torch_sap.VerifiedWeight(**weight) for weight in values["weights"])) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.weights = ()
    assert str(found) == "2 pruned weights, 0 received with another sparsity"


def test_errors_name_the_rule():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        verify(3, vector())
    with pytest.raises(ValueError, match="model must have a pruned weight"):
        verify(mlp(), torch.randn(3, 6))
