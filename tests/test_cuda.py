"""On a GPU: what the host computes, without waiting for the device; skipped where there is none."""

import copy
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import FUNCTIONS, SCOPES, assert_held, lookup, mask_of, mlp, value_of, weight_names, zoo
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.selection import keys

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
}


@contextmanager
def waits():
    """The warnings of PyTorch about operations for which the host waits."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found[:] = [each for each in found if "synchronizing CUDA operation" in str(each.message)]


def resnet():
    torch.manual_seed(5)
    return timm.create_model("resnet18", num_classes=10)


def vit():
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=10, img_size=32)


def batch(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((8, 3, 32, 32), generator=generator).cuda(), (torch.arange(8) % 10).cuda()


def step(model, optimizer, of_batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(of_batch[0]), of_batch[1]).backward()
    optimizer.step()


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
        monkeypatch.setattr(keys, "DEVICE_CHUNK", 999)
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
def test_a_step_waits_a_few_times_whatever_the_number_of_tensors(scope, pruned):
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [resnet, vit])
def test_training_waits_for_nothing_and_keeps_the_zeros(make, optimizer):
    model = make().cuda()
    made_before = OPTIMIZERS[optimizer](model.parameters())
    step(model, made_before, batch())  # momentum from before the pruning
    torch_sap.layer_unstructured(model, eta_r=0.5)
    for seed in range(4):
        inputs = batch(seed)
        torch.cuda.synchronize()
        with waits() as warned:
            step(model, made_before, inputs)
        assert not warned, [f"{each.filename}:{each.lineno}" for each in warned]
        assert_held(model)


@pytest.mark.parametrize("make", [resnet, vit])
def test_training_is_that_of_a_model_masked_by_hand(make):
    model = make().cuda().double()
    dense = copy.deepcopy(model)
    torch_sap.layer_unstructured(model, eta_r=0.5)
    masks = [(dict(dense.named_parameters())[name], mask_of(model, name)) for name in weight_names(dense)]
    optimizers = [OPTIMIZERS["sgd"](each.parameters()) for each in (model, dense)]
    with torch.no_grad():
        for weight, mask in masks:
            weight.mul_(mask)
    for seed in range(4):
        images, labels = batch(seed)
        inputs = images.double(), labels
        step(model, optimizers[0], inputs)
        optimizers[1].zero_grad()
        nn.functional.cross_entropy(dense(inputs[0]), inputs[1]).backward()
        for weight, mask in masks:
            weight.grad.mul_(mask)
        optimizers[1].step()
    for name in weight_names(dense):
        torch.testing.assert_close(value_of(model, name), value_of(dense, name))
    assert_held(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_automatic_mixed_precision(dtype):
    model = resnet().cuda()
    torch_sap.global_unstructured(model, eta_r=0.5)
    optimizer, scaler = OPTIMIZERS["sgd"](model.parameters()), torch.amp.GradScaler("cuda")
    for seed in range(4):
        images, labels = batch(seed)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for name in weight_names(model):
            module, own = lookup(model, name)
            assert torch.count_nonzero(getattr(module, own).grad[~mask_of(model, name)]) == 0
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert_held(model)
    assert torch_sap.verify(model, batch()[0]).effective


def test_a_training_step_captured_in_a_cuda_graph_keeps_the_zeros():
    model = mlp().cuda()
    torch_sap.global_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    inputs, labels = torch.randn(16, 6, device="cuda"), torch.arange(16, device="cuda") % 4

    def train():
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    before = model[0].weight.detach().clone()
    for _ in range(5):
        inputs.normal_()
        graph.replay()
    assert not torch.equal(before, model[0].weight)
    assert_held(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_on_a_device(backend):
    model = vit().cuda()
    torch_sap.layer_unstructured(model, eta_r=0.5)
    compiled = torch.compile(model, backend=backend)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for seed in range(3):
        step(compiled, optimizer, batch(seed))
        assert_held(model)
    torch._dynamo.reset()


def test_a_pruned_model_moves_between_devices():
    model = mlp()
    torch_sap.global_unstructured(model, eta_r=0.5)
    kept = [mask_of(model, name).clone() for name in weight_names(model)]
    model.cuda()
    assert_held(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 6, device="cuda")).square().mean().backward()
        optimizer.step()
    assert_held(model)
    assert all(torch.equal(a, mask_of(model, n).cpu()) for a, n in zip(kept, weight_names(model), strict=True))
    state = model.state_dict()
    other = mlp()
    torch_sap.global_unstructured(other, gamma=0.0)
    other.load_state_dict({key: value.cpu() for key, value in state.items()})
    model.cpu()
    assert_held(model)
    torch.testing.assert_close(other.eval()(torch.ones(2, 6)), model.eval()(torch.ones(2, 6)))
    torch_sap.global_unstructured(model.cuda(), eta_r=0.5)
    torch_sap.remove(model)
    assert not prune.is_pruned(model)


def train_fn(model, seeds=range(6)):
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for seed in seeds:
        step(model, optimizer, batch(seed))


@pytest.mark.parametrize("scope", SCOPES)
def test_iterative_sap_rewinds_on_the_device(scope):
    model = vit().cuda()
    start = {name: value_of(model, name).clone() for name in weight_names(model)}
    rewound = []

    def observed(model):
        rewound.append({name: value_of(model, name).clone() for name in start})
        train_fn(model)

    history = torch_sap.iterative_sap(model, observed, scope=scope, iterations=3, eta_r=0.2)
    assert len(history) >= 4
    assert history[-1].remaining < history[0].remaining
    assert_held(model)
    for values in rewound[1:]:
        for name, first in start.items():
            kept = values[name] != 0
            assert torch.equal(values[name][kept], first[kept]), name


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole, cut = vit().cuda(), vit().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        history = torch_sap.iterative_sap(whole, train_fn, iterations=3, eta_r=0.2)
        torch_sap.iterative_sap(cut, train_fn, iterations=1, eta_r=0.2, checkpoint=tmp_path / "run.pt")
        again = vit().cuda()
        resumed = torch_sap.iterative_sap(again, train_fn, iterations=3, eta_r=0.2, checkpoint=tmp_path / "run.pt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [each.remaining for each in resumed] == [each.remaining for each in history]
    for name in weight_names(whole):
        assert torch.equal(value_of(again, name), value_of(whole, name)), name
        assert mask_of(again, name).is_cuda


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
    torch_sap.save_masks(model, tmp_path / "masks.safetensors")
    torch_sap.save_sparse(model, tmp_path / "sparse.safetensors")
    other = vit().cuda()
    torch_sap.load_masks(other, tmp_path / "masks.safetensors")
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


@pytest.fixture
def nccl(tmp_path):
    if not dist.is_nccl_available():
        pytest.skip("needs a GPU with NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
def test_ddp_and_fsdp2_with_nccl(nccl, scope):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    alone = vit().cuda()
    parallel = DistributedDataParallel(copy.deepcopy(alone))
    sharded = copy.deepcopy(alone)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    models = alone, parallel, sharded
    optimizers = [OPTIMIZERS["sgd"](model.parameters()) for model in models]
    for number in range(3):
        reports = [FUNCTIONS[scope](model, eta_r=0.2) for model in models]
        if not number:
            assert reports[0].tensors == reports[1].tensors == reports[2].tensors
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch(number))
    assert_held(parallel.module)
    for module, name in torch_sap.prunable_parameters(sharded):
        weight, mask = (getattr(module, name + end).full_tensor() for end in ("_orig", "_mask"))
        assert torch.count_nonzero(weight[~mask]) == 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_on_a_device():
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning_modules import EPOCHS, Module, loader

    from torch_sap.integrations.lightning import SAPCallback

    callback, module = SAPCallback(EPOCHS), Module()
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=3 * EPOCHS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader())
    assert len(callback.history) >= 2
    assert callback.history[-1].remaining < callback.history[0].remaining
