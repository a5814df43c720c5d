"""Pruned models that train on a GPU: zeros after every step, no wait for the device; skipped where there is none."""

import copy

import pytest
import torch
import torch.distributed as dist
from cuda_models import OPTIMIZERS, batch, needs_gpu, resnet, step, vit, waits
from helpers import FUNCTIONS, SCOPES, assert_held, lookup, mask_of, mlp, value_of, weight_names
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.masks import zeros_cuda

pytestmark = needs_gpu


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


def captured(train):
    """A CUDA graph of a training step that has been made three times on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    return graph


def test_a_training_step_captured_in_a_cuda_graph_keeps_the_zeros():
    model = mlp().cuda()
    torch_sap.global_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    inputs, labels = torch.randn(16, 6, device="cuda"), torch.arange(16, device="cuda") % 4

    def train():
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    graph = captured(train)
    before = model[0].weight.detach().clone()
    for _ in range(5):
        inputs.normal_()
        graph.replay()
    assert not torch.equal(before, model[0].weight)
    assert_held(model)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_captured_step_does_not_need_the_tables_that_are_kept(set_to_none):
    """A graph holds addresses; the tables that were there when it was captured may be gone when it is replayed."""
    model = mlp().cuda()
    torch_sap.global_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    inputs = torch.randn(16, 6, device="cuda")

    def train():
        optimizer.zero_grad(set_to_none=set_to_none)
        model(inputs).square().mean().backward()
        optimizer.step()

    graph = captured(train)
    zeros_cuda._table.cache_clear()
    others = [torch.full((1000,), 3.0, device="cuda") for _ in range(200)]
    for _ in range(5):
        graph.replay()
    assert_held(model)
    assert all(bool((other == 3).all()) for other in others)


@pytest.mark.parametrize("make", [resnet, vit])
def test_zeros_of_all_tensors_are_stored_in_one_launch_each_time(make):
    model = make().cuda()
    torch_sap.layer_unstructured(model, eta_r=0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for seed in range(3):
        step(model, optimizer, batch(seed))
    inputs = batch(3)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step(model, optimizer, inputs)
        torch.cuda.synchronize()
    names = [event.name for event in found.events() if event.device_type is torch.autograd.DeviceType.CUDA]
    assert sum("store_zeros" in name for name in names) == 3
    assert sum("HtoD" in name for name in names) <= 2
    assert_held(model)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_at_any_address(dtype, offset):
    """As in the buckets of DistributedDataParallel."""
    memory = torch.full((40_000,), float("nan"), dtype=dtype, device="cuda")
    sizes, start, pairs = [(33, 7), (1, 1), (70, 300), (5, 3, 3, 3)], offset, []
    for shape in sizes:
        size = torch.Size(shape).numel()
        pairs.append((memory[start : start + size].view(shape), torch.rand(shape, device="cuda") > 0.5))
        start += size + offset
    outside = torch.ones_like(memory, dtype=torch.bool)
    for tensor, mask in pairs:
        first = (tensor.data_ptr() - memory.data_ptr()) // memory.itemsize
        outside[first : first + tensor.numel()] = mask.reshape(-1)
    assert not zeros_cuda.store_zeros_(pairs)
    assert bool(memory[outside].isnan().all())
    assert not torch.count_nonzero(memory[~outside])


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
