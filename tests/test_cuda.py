"""Pruning steps on a GPU: what the host computes, without waiting for the device; skipped where there is none."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_models import batch, needs_gpu, resnet, vit, waits
from helpers import FUNCTIONS, SCOPES, mask_of, mlp, value_of, weight_names, zoo
from step_cases import DTYPES, RULES, SMALL, random_case
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.decide import backends, triton_backend
from torch_sap.decide.bounds import FixedRatio
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.step import prune_step
from torch_sap.masks import zeros_cuda

pytestmark = needs_gpu


def assert_same_masks(on_device, on_host):
    for name in weight_names(on_host):
        found = mask_of(on_device, name)
        assert found.is_cuda, name
        assert torch.equal(found.cpu(), mask_of(on_host, name)), name
        assert torch.count_nonzero(value_of(on_device, name)[~found]) == 0, name


@pytest.fixture(params=["kernels", "small programs", "one batch", "batches", "deterministic"])
def batched(request, monkeypatch):
    """Kernels, with one or several programs per tensor; PyTorch's operations on whole tensors or on parts."""
    if request.param == "small programs":
        for name, value in SMALL.items():
            monkeypatch.setattr(triton_backend, name, value)
    elif request.param != "kernels":
        monkeypatch.setattr(triton_backend, "usable", lambda device: False)
        monkeypatch.setattr(backends.Torch, "chunk", backends.Torch.chunk if request.param == "one batch" else 999)
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
    assert extra < weights + 32 * 2**20, extra / 2**20


def test_the_kernels_are_used():
    """Otherwise the other tests would say nothing about them."""
    assert triton_backend.usable(torch.device("cuda", torch.cuda.current_device()))


def on_device(entries):
    """Entries with their tensors on the GPU, in the same order of memory."""
    return [replace(e, scores=e.scores.cuda(), mask=None if e.mask is None else e.mask.cuda()) for e in entries]


@pytest.mark.parametrize("small", [False, True], ids=["", "small programs"])
@pytest.mark.parametrize("part", range(10))
def test_a_sample_of_the_grid(part, small, monkeypatch):
    for name, value in SMALL.items() if small else ():
        monkeypatch.setattr(triton_backend, name, value)
    for seed in range(30 * part, 30 * part + 30):
        entries, scope, rule, _ = random_case(seed)
        wanted, found = prune_step(entries, scope, rule), prune_step(on_device(entries), scope, rule)
        for name, group in wanted.groups.items():
            np.testing.assert_array_equal(group.c, found.groups[name].c, err_msg=str(seed))
        for name, table in wanted.sums._tables["neuron"].items():
            np.testing.assert_allclose(found.sums._tables["neuron"][name], table, rtol=1e-13, atol=0, err_msg=str(seed))
        assert found.remaining == wanted.remaining
        for mask, other in zip(wanted.masks, found.masks, strict=True):
            assert (mask is None) == (other is None)
            assert mask is None or torch.equal(mask, other.cpu()), seed


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_numbers_of_a_type_count(dtype):
    """A GPU may take them for zeros."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    entries = [Entry("w", (torch.arange(1, 41).reshape(4, 10) * smallest).to(dtype))]
    assert entries[0].scores.all()
    for scope in SCOPES:
        wanted, found = prune_step(entries, scope, RULES[1]), prune_step(on_device(entries), scope, RULES[1])
        assert torch.equal(wanted.masks[0], found.masks[0].cpu())


def test_sums_have_the_same_bits_in_every_run():
    entries = on_device([Entry("w", torch.randn(3000, 700)), Entry("v", torch.randn(64, 64, 3, 3))])
    first, *others = (
        list(triton_backend.Launches(split(entries, "layer")).tables(0.3, 1.7).values()) for _ in range(5)
    )
    for other in others:
        for one, again in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, again)


def test_more_than_2_to_the_31_entries():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB")
    size = 2**31 + 12345
    weights = torch.zeros(1, size, dtype=torch.float16, device="cuda")
    weights[0, :1000] = weights[0, -1000:] = torch.arange(1, 1001, dtype=torch.float16, device="cuda")
    mask = weights != 0
    mask[0, 5000:6000] = True
    (new,) = prune_step([Entry("w", weights, mask)], "layer", FixedRatio(ratio=0.5)).masks
    assert new.sum() == 1500  # all 1000 zeros, and the smallest 500 of the others
    assert new[0, :250].sum() == 0
    assert new[0, -1000:-750].sum() == 0
    weights.fill_(1)
    assert not zeros_cuda.store_zeros_([(weights, new)])
    assert int(torch.count_nonzero(weights)) == 1500


def kernels_of(call):
    """Names of the kernels and copies that a call launches."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return [event.name for event in found.events() if event.device_type is torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_of_a_step_do_not_grow_with_the_tensors(dtype):
    found = []
    for depth in (2, 20):
        entries = on_device([Entry(str(n), torch.randn(64, 64).to(dtype)) for n in range(depth)])
        prune_step(entries, "global", RULES[1])
        found.append(kernels_of(lambda entries=entries: prune_step(entries, "global", RULES[1])))
    assert len(found[0]) == len(found[1]) <= 12, found


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
