"""Recurrent modules, attention, tied weights, and timm models that read weights without a call: trained."""

import copy
import warnings

import pytest
import torch
from helpers import assert_held, convnet, fit, masked_by_hand, masks_of, value_of, weight_names
from torch import nn

from torch_sap import layer_unstructured, neuron_unstructured, remove


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
    copied = copy.deepcopy(model)
    for each in (model, copied):
        fit(each, momentum(each), shape)
        assert each.head.weight is each.embedding.weight
    remove(model)
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == 4


def test_flat_weights_of_an_lstm_are_the_parameters():
    model, _, _ = twins("lstm")
    layer_unstructured(model, eta_r=0.3)
    for name, weight in zip(model.recurrent._flat_weights_names, model.recurrent._flat_weights, strict=True):
        assert weight is getattr(model.recurrent, name)
        assert isinstance(weight, nn.Parameter)


READERS = ("eva", "beit", "swin v2")


def reader(kind):
    """A small timm model that reads weights without calling their modules."""
    timm = pytest.importorskip("timm")
    small = {"img_size": 16, "num_classes": 5, "in_chans": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if kind == "swin v2":
            options = {"patch_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
            return timm.models.swin_transformer_v2.SwinTransformerV2(**small, **options, drop_path_rate=0.0)
        options = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        if kind == "eva":
            return timm.models.eva.Eva(**small, **options, swiglu_mlp=True, use_rot_pos_emb=True)
        return timm.models.beit.Beit(**small, **options, use_rel_pos_bias=True, init_values=0.1)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("prune", [layer_unstructured, neuron_unstructured])
def test_timm_models_that_read_weights_train_like_models_masked_by_hand(kind, prune):
    model = reader(kind)
    dense, shape = copy.deepcopy(model), (2, 1, 16, 16)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3, weight_decay=0.05) for each in (model, dense)]
    for seed in (1, 2):
        prune(model, eta_r=0.1)
        masks = masks_of(model)
        masked_by_hand(dense, masks)
        losses = fit(model, optimizers[0], shape, 3, seed=seed)
        assert losses == fit(dense, optimizers[1], shape, 3, masks, seed=seed)
        assert_held(model)
    assert all(torch.equal(value_of(model, name), value_of(dense, name)) for name in weight_names(dense))
