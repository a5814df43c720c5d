"""Pruning steps on a GPU: what the host computes, without waiting for the device; skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from cuda_models import batch, needs_gpu, resnet, vit, waits
from helpers import FUNCTIONS, SCOPES, mask_of, mlp, value_of, weight_names, zoo
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.decide import backends

pytestmark = needs_gpu


def assert_same_masks(on_device, on_host):
    for name in weight_names(on_host):
        found = mask_of(on_device, name)
        assert found.is_cuda, name
        assert torch.equal(found.cpu(), mask_of(on_host, name)), name
        assert torch.count_nonzero(value_of(on_device, name)[~found]) == 0, name


@pytest.fixture(params=["one batch", "batches", "deterministic"])
def batched(request, monkeypatch):
    """Batches of many tensors, or parts of one; with and without atomic operations."""
    if request.param != "one batch":
        monkeypatch.setattr(backends.Torch, "chunk", 999)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("batched")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", SCOPES)
def test_small_tensors_give_what_they_give_on_the_host(scope, dtype):
    for factor in (1, 30):  # many different magnitudes, or many equal ones and zeros
        host = zoo()
        for parameter in host.parameters():
            parameter.data = parameter.data if factor == 1 else parameter.data.mul(factor).round()
        host.to(dtype)
        device = copy.deepcopy(host).cuda()
        for _ in range(3):
            for model in (host, device):
                FUNCTIONS[scope](model, eta_r=0.2)
            assert_same_masks(device, host)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("make", [zoo, resnet, vit])
def test_masks_and_counts_are_those_of_the_host(make, scope, dtype):
    host = make().to(dtype)
    device = copy.deepcopy(host).cuda()
    for p, q in [(0.5, 1.0), (1.0, 2.0), (0.5, 1.0)]:
        first, second = (FUNCTIONS[scope](model, p, q, eta_r=0.1) for model in (host, device))
        for name, group in first.groups.items():
            np.testing.assert_allclose(group.index, second.groups[name].index, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(group.c, second.groups[name].c)
        assert first.tensors == second.tensors
        assert_same_masks(device, host)
    assert first.remaining < first.total


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_go_by_position_as_on_the_host(scope):
    host = resnet()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.mul_(50).round_()
    device = copy.deepcopy(host).cuda()
    for _ in range(3):
        for model in (host, device):
            FUNCTIONS[scope](model, eta_r=0.3)
        assert_same_masks(device, host)


def test_channels_last_is_pruned_as_it_lies():
    host = resnet()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.mul_(50).round_()
    device = copy.deepcopy(host).cuda().to(memory_format=torch.channels_last)
    for _ in range(2):
        for model in (host, device):
            torch_sap.global_unstructured(model, eta_r=0.2)
        assert_same_masks(device, host)
    weight = device.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scope", SCOPES)
def test_weights_on_the_host_and_on_the_device_in_one_model(scope):
    host = zoo()
    mixed = copy.deepcopy(host)
    for name in ("linear", "grouped", "embedding"):
        mixed[name].cuda()
    for _ in range(3):
        first, second = (FUNCTIONS[scope](model, eta_r=0.2) for model in (host, mixed))
        assert first.tensors == second.tensors
        for name in weight_names(host):
            assert mask_of(mixed, name).device == value_of(mixed, name).device
            assert torch.equal(mask_of(mixed, name).cpu(), mask_of(host, name))


@pytest.mark.parametrize("pruned", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_waits_a_few_times_however_many_tensors_there_are(scope, pruned):
    found = []
    for depth in (2, 12):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth))).cuda()
        if pruned:
            FUNCTIONS[scope](model, eta_r=0.2)
        torch.cuda.synchronize()
        with waits() as warned:
            FUNCTIONS[scope](model, eta_r=0.2)
        found.append([str(each.filename) + ":" + str(each.lineno) for each in warned])
    assert len(found[0]) == len(found[1]) <= 4, found


def test_memory_does_not_grow_with_the_rounds():
    model = resnet().cuda()
    seen = []
    for _ in range(20):
        torch_sap.global_unstructured(model, eta_r=0.05)
        seen.append(torch.cuda.memory_allocated())
    assert len(set(seen)) == 1, seen


def test_a_step_takes_little_memory_beside_the_masks():
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).cuda()
    weights = 8 * 4096**2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch_sap.global_unstructured(model)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < weights + 400 * 2**20, extra / 2**20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_on_a_device_change_nothing(bad):
    model = mlp().cuda()
    with torch.no_grad():
        model[3].weight[1, 1] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"3\.weight"):
        torch_sap.global_unstructured(model)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("measure", [torch_sap.pq_index, torch_sap.gini_index])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_measures_of_a_tensor(measure, dim):
    tensor = torch.randn(300, 200)
    mask = torch.rand(300, 200) > 0.3
    found = measure(tensor.cuda(), dim=dim, mask=mask.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), measure(tensor, dim=dim, mask=mask), rtol=0, atol=1e-12)


def test_pqi_of_1e8_weights_is_that_of_float64():
    weights = torch.randn(100_000_000, device="cuda") * 0.02
    x = weights.double().abs()
    literal = 1 - (1 / x.numel()) * x.sqrt().sum().item() ** 2 / x.sum().item()
    assert abs(torch_sap.pq_index(weights).item() - literal) < 1e-10
    assert abs(torch_sap.pq_index(weights.cpu()).item() - literal) < 1e-10


def test_files_written_on_a_device(tmp_path):
    model = vit().cuda()
    torch_sap.global_unstructured(model, eta_r=0.5)
    torch_sap.save_sparse(model, tmp_path / "masks.safetensors", what="masks")
    torch_sap.save_sparse(model, tmp_path / "sparse.safetensors")
    other = vit().cuda()
    torch_sap.load_sparse(other, tmp_path / "masks.safetensors", what="masks")
    for name in weight_names(other):
        assert torch.equal(mask_of(other, name), mask_of(model, name))
    torch_sap.summary(model, batch()[0])


def test_methods_inside_pytorchs_own_functions():
    host, device = mlp(), mlp().cuda()
    for model in (host, device):
        torch_sap.PQILayer.apply(model[0], "weight")
        prune.global_unstructured(
            [(model[0], "weight"), (model[3], "weight")], pruning_method=torch_sap.PQIGlobal, p=0.5, q=1.0
        )
        torch_sap.PQINeuron.apply(model[3], "weight")
    for module, other in ((host[0], device[0]), (host[3], device[3])):
        assert torch.equal(module.weight_mask.bool(), other.weight_mask.bool().cpu())
