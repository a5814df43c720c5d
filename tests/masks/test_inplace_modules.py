"""Masks held in place on recurrent modules, attention, tied, frozen and channels_last weights; compile, AMP, DDP."""

import copy

import pytest
import torch
from helpers import assert_held, convnet, fit, mask_of, masked_by_hand, masks_of, mlp, value_of, weight_names
from torch import nn

from torch_sap import layer_unstructured, remove


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(6, 5, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs):
        return self.head(self.recurrent(inputs)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.MultiheadAttention(6, 2)
        self.other = nn.MultiheadAttention(6, 2, kdim=6, vdim=6, add_bias_kv=True)
        self.other._qkv_same_embed_dim = self.other._qkv_same_embed_dim

    def forward(self, inputs):
        return self.other(*[self.same(inputs, inputs, inputs)[0]] * 3)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        return self.head(self.middle(self.embedding(inputs.abs().mul(3).long().clamp(max=6))))


MODULES = {
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3, 6)),
    "attention": (Attention, (4, 3, 6)),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), (4, 3, 6)),
    "tied": (Tied, (4, 3)),
    "channels_last": (lambda: convnet().to(memory_format=torch.channels_last), (4, 2, 6, 6)),
}
each_module = pytest.mark.parametrize("kind", MODULES)


def twins(kind):
    make, shape = MODULES[kind]
    torch.manual_seed(4)
    model = make()
    return model, copy.deepcopy(model), shape


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@each_module
def test_trains_like_a_model_masked_by_hand(kind):
    model, dense, shape = twins(kind)
    optimizers = [momentum(each) for each in (model, dense)]
    for seed in (1, 2):
        layer_unstructured(model, eta_r=0.2)
        assert_held(model)
        masks = masks_of(model)
        masked_by_hand(dense, masks)
        assert fit(model, optimizers[0], shape, seed=seed) == fit(dense, optimizers[1], shape, masks=masks, seed=seed)
        assert_held(model)
    for name, mask in masks.items():
        assert torch.equal(value_of(model, name), value_of(dense, name) * mask), name


@each_module
def test_copies_and_remove(kind):
    model, dense, shape = twins(kind)
    layer_unstructured(model, eta_r=0.3)
    fit(model, momentum(model), shape)
    copied = copy.deepcopy(model)
    assert fit(model, momentum(model), shape) == fit(copied, momentum(copied), shape)
    assert_held(copied)
    inputs = torch.randn(shape)
    output = copied.eval()(inputs)
    remove(copied)
    assert list(copied.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in dense.named_parameters()]
    torch.testing.assert_close(copied(inputs), output)
    dense.load_state_dict(copied.state_dict())
    torch.testing.assert_close(dense.eval()(inputs), output)


@each_module
def test_eval_and_training_see_the_same_zeros(kind):
    model, dense, shape = twins(kind)
    layer_unstructured(model, eta_r=0.3)
    masked_by_hand(dense, masks_of(model))
    inputs = torch.randn(shape)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(inputs), dense.train(training)(inputs))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(inputs), dense.eval()(inputs))


def test_tied_weights_stay_tied():
    model, _, shape = twins("tied")
    layer_unstructured(model, eta_r=0.3)
    fit(model, momentum(model), shape)
    copied = copy.deepcopy(model)
    fit(copied, momentum(copied), shape)
    for each in (model, copied):
        assert each.head.weight is each.embedding.weight
        assert_held(each)
    remove(model)
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == 4


def test_flat_weights_of_an_lstm_are_the_parameters():
    model, _, _ = twins("lstm")
    layer_unstructured(model, eta_r=0.3)
    for name, weight in zip(model.recurrent._flat_weights_names, model.recurrent._flat_weights, strict=True):
        assert weight is getattr(model.recurrent, name)
        assert isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_weights(when):
    model = mlp()
    if when == "before":
        model[0].weight.requires_grad_(False)
    layer_unstructured(model, eta_r=0.3)
    model[0].weight_orig.requires_grad_(False)
    frozen = model[0].weight_orig.clone()
    fit(model, torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1), (5, 6))
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight_orig.grad is None
    assert_held(model)
    layer_unstructured(model, eta_r=0.3)
    assert [value.requires_grad for value in model.parameters()].count(False) == 1
    model[0].weight_orig.requires_grad_(True)
    fit(model, momentum(model), (5, 6))
    assert_held(model)
    assert not torch.equal(model[0].weight, frozen)
    assert torch.count_nonzero(model[0].weight_orig.grad[~mask_of(model, "0.weight")]) == 0


def test_channels_last_stays_channels_last():
    model = convnet().to(memory_format=torch.channels_last)
    layer_unstructured(model, eta_r=0.3)
    fit(model, momentum(model), (4, 2, 6, 6))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    converted = convnet()
    layer_unstructured(converted, eta_r=0.3)
    converted.to(memory_format=torch.channels_last)
    fit(converted, momentum(converted), (4, 2, 6, 6))
    assert_held(converted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pruned", ["before", "after"])
def test_compile_without_graph_breaks(backend, pruned):
    torch._dynamo.reset()
    model, inputs = mlp(), torch.randn(5, 6)
    dense = copy.deepcopy(model)
    if pruned == "before":
        layer_unstructured(model, eta_r=0.2)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(inputs)
    dense.load_state_dict(
        {key.removesuffix("_orig"): value for key, value in model.state_dict().items() if "mask" not in key}
    )
    layer_unstructured(model, eta_r=0.2)
    masks = masks_of(model)
    masked_by_hand(dense, masks)
    losses = fit(compiled, momentum(model), (5, 6))
    assert losses == pytest.approx(fit(dense, momentum(dense), (5, 6), masks=masks), rel=1e-5)
    assert_held(model)
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)
        torch.testing.assert_close(compiled(inputs), model(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    model, inputs = mlp(), torch.randn(5, 6)
    layer_unstructured(model, eta_r=0.3)
    optimizer = momentum(model)
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            loss = model(inputs).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_held(model)
    assert model[0].weight.dtype == torch.float32


def test_functional_call_takes_the_mask_into_account():
    model, inputs = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    layer_unstructured(model, eta_r=0.3)
    state = {**dict(model.named_parameters()), "0.weight_orig": torch.ones(4, 6)}
    output = torch.func.functional_call(model, state, (inputs,))
    expected = nn.functional.linear(inputs, model[0].weight_mask.float(), model[0].bias)
    torch.testing.assert_close(output, expected)
    assert model[0].weight is model[0].weight_orig, "the tensor of the functional call is let go"
    model(inputs)
    assert_held(model)


def test_gradient_checkpointing():
    model, inputs = mlp(), torch.randn(5, 6)
    layer_unstructured(model, eta_r=0.3)
    torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False).square().mean().backward()
    for name in weight_names(model):
        gradient = dict(model.named_parameters())[name + "_orig"].grad
        assert torch.count_nonzero(gradient[~mask_of(model, name)]) == 0
        assert torch.count_nonzero(gradient) > 0


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pruned", ["before", "after"])
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(pruned):
    model, dense = mlp(), mlp()
    if pruned == "before":
        layer_unstructured(model, eta_r=0.2)
    parallel = nn.parallel.DistributedDataParallel(model)
    if pruned == "after":
        layer_unstructured(model, eta_r=0.2)
    masks = masks_of(model)
    masked_by_hand(dense, masks)
    assert fit(parallel, momentum(parallel), (5, 6)) == fit(dense, momentum(dense), (5, 6), masks=masks)
    assert_held(model)
    for name, mask in masks.items():
        gradient = dict(model.named_parameters())[name + "_orig"].grad
        assert torch.count_nonzero(gradient[~mask]) == 0
