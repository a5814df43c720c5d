"""shrink takes out what pruning emptied where outputs stay equal, in float64, and says why the rest stays."""

import copy
import sys

import pytest
import torch
from helpers import assert_unchanged, snapshot
from timm_training import make, timm
from torch import nn

import torch_sap
from torch_sap.integrations import torch_pruning
from torch_sap.integrations.torch_pruning import shrink

pytest.importorskip("torch_pruning")


def emptied(model, share=0.4, seed=0):
    """The model in float64 with rows of zeros, biases and statistics of all kinds, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name in ("bias", "running_mean"):
                if isinstance(tensor := getattr(module, name, None), torch.Tensor):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                rows = torch.randperm(len(module.weight), generator=generator)[: int(share * len(module.weight))]
                module.weight[rows] = 0
    return model


def assert_equal(one, other, *shape):
    """Outputs for inputs that are not the example."""
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(one(x), other(x), rtol=1e-10, atol=1e-10)


def images(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_constants_go_into_the_next_bias():
    model = emptied(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 5, bias=False)))
    found = shrink(model, images(3, 6))
    assert found.removed == {"0.weight": 4}
    assert (found.model[0].weight.shape, found.model[2].weight.shape) == ((6, 6), (5, 6))
    assert (found.weights_before, found.weights_after) == (110, 66)
    assert found.model[2].bias is not None
    assert_equal(model, found.model, 4, 6)
    assert found.kept == {"2.weight": "they are outputs of the model"}
    assert str(found).splitlines() == [
        "removed 4 output channels, 66 of 110 weights are left",
        "  0.weight: 4 removed",
        "  2.weight: empty rows stay, they are outputs of the model",
    ]


def conv_pair(**second):
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, **second), nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize("second", [{}, {"padding": 1, "padding_mode": "replicate"}, {"padding": "valid"}])
def test_convolutions_where_every_position_sees_the_constant(second):
    model = conv_pair(**second)
    model(torch.zeros(1, 2, 9, 9))
    model = emptied(model)
    found = shrink(model, images(2, 2, 9, 9))
    assert found.removed["0.weight"] == 3
    assert found.model[1].num_features == 5
    assert_equal(model, found.model, 3, 2, 9, 9)


@pytest.mark.parametrize("padding", [1, "same"])
def test_zero_padding_lets_only_zeros_go(padding):
    model = conv_pair(padding=padding)
    model(torch.zeros(1, 2, 9, 9))
    model = emptied(model, share=1.0)
    with torch.no_grad():
        model[0].weight[4:] = 1.0
        model[0].bias.zero_(), model[1].running_mean.zero_()
        model[1].bias[:4] = torch.tensor([1.0, -1.0, 0.0, 2.0])
        model[3].weight.normal_()
    found = shrink(model, images(2, 2, 9, 9))
    assert found.removed["0.weight"] == 2  # the ReLU makes these 0
    assert found.kept["0.weight"] == "3 gets no constant, or pads it with zeros"
    assert_equal(model, found.model, 3, 2, 9, 9)


def test_flattened_channels():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 4))
    model = emptied(model)
    found = shrink(model, images(2, 2, 8, 8))
    assert found.removed == {"0.weight": 2}
    assert found.model[4].weight.shape == (4, 4 * 9)
    assert_equal(model, found.model, 3, 2, 8, 8)


def test_unread_channels_go_and_then_what_fed_only_them():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()
    with torch.no_grad():
        model[4].weight[:, :2] = 0  # channels 0 and 1 of layer 2 are not read
        model[2].weight[2:, :3] = 0  # without them, channels 0 to 2 of layer 0 are not read
    found = shrink(model, images(2, 5))
    assert found.removed == {"2.weight": 2, "0.weight": 3}
    assert_equal(model, found.model, 3, 5)
    assert found.kept == {}


def test_one_channel_stays():
    model = emptied(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), share=1.0)
    found = shrink(model, images(2, 5))
    assert found.removed == {"0.weight": 5}
    assert found.kept["0.weight"] == "one channel has to stay"
    assert_equal(model, found.model, 3, 5)


class Net(nn.Module):
    """Three linear layers on a given way, and perhaps more modules."""

    def __init__(self, way, width=6, **more):
        super().__init__()
        self.way, self.first, self.second, self.last = way, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(width, 2)
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.way(self, x)


def functional(m, x):
    return m.last(nn.functional.linear(m.second(m.first(x)), m.inner["weight"]))


def given_out(m, x):
    middle = m.first(x)
    return m.last(m.second(middle)), middle


WAYS = {
    "residual": lambda: Net(lambda m, x: m.last(x + m.second(torch.relu(m.first(x))))),
    "gated": lambda: Net(lambda m, x: m.last(m.first(x) * torch.sigmoid(m.second(x)))),
    "concatenated": lambda: Net(lambda m, x: m.last(torch.cat([m.first(x), m.second(x)], 1)), width=12),
    "normalized": lambda: Net(lambda m, x: m.last(m.norm(m.first(m.second(x)))), norm=nn.LayerNorm(6)),
    "given out": lambda: Net(given_out),
    "functional": lambda: Net(functional, inner=nn.ParameterDict({"weight": nn.Parameter(torch.randn(6, 6))})),
    "twice": lambda: Net(lambda m, x: m.last(m.first(m.first(m.second(x))))),
    "softmax": lambda: Net(lambda m, x: m.last(m.first(m.second(x)).softmax(1))),
}


@pytest.mark.parametrize(
    ("way", "removed", "kept"),
    [
        ("residual", {"first.weight"}, {"second.weight": "Add is on their path"}),
        ("gated", set(), {"first.weight": "Mul is on their path", "second.weight": "Mul is on their path"}),
        ("concatenated", set(), {"first.weight": "they go together with those of _ConcatOp"}),
        ("normalized", {"second.weight"}, {"first.weight": "they go together with those of norm"}),
        ("given out", set(), {"first.weight": "they are outputs of the model"}),
        ("functional", {"first.weight"}, {"second.weight": ""}),
        ("twice", set(), {"first.weight": "they go together with those of second"}),
        ("softmax", {"second.weight"}, {"first.weight": "Softmax is on their path"}),
    ],
)
def test_paths_that_mix_channels(way, removed, kept):
    model = emptied(WAYS[way]())
    found = shrink(model, images(4, 6))
    assert set(found.removed) - {"second.weight"} == removed - {"second.weight"}
    assert removed <= set(found.removed)
    for name, why in kept.items():
        assert why in found.kept[name], found.kept
    assert_equal(lambda x: as_tensor(model(x)), lambda x: as_tensor(found.model(x)), 5, 6)


def as_tensor(out):
    return torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out


def test_shared_grouped_and_other_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Unflatten(1, (4, 1)))
    model[1].weight = model[0].weight
    model.append(nn.Conv1d(4, 4, 1, groups=2)).append(nn.Flatten()).append(nn.Linear(4, 2))
    model = emptied(model, share=0.5)
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[4].weight[:1] = 0
    found = shrink(model, images(3, 4))
    assert "shares a weight with another module" in found.kept["0.weight"]
    assert "4 is a grouped convolution" in found.kept["4.weight"]
    assert_equal(model, found.model, 5, 4)


MODELS = {
    "test_resnet": 160,
    "test_vit": 160,
    "test_efficientnet": 160,
    "test_convnext": 160,
    "test_nfnet": 96,
    "test_byobnet": 96,
    "resnet18": 64,
    "resnet50": 64,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("resnet") else ()) for name in MODELS]
)
def test_timm_models(name):
    torch.manual_seed(0)
    model = emptied(timm.create_model(name, num_classes=7), share=0.3)
    found = shrink(model, images(2, 3, MODELS[name], MODELS[name]))
    assert found.removed
    assert_equal(model, found.model, 3, 3, MODELS[name], MODELS[name])


def test_weights_read_without_their_module():
    model = emptied(make("eva"), share=0.3)
    found = shrink(model, images(2, 3, 32, 32))
    assert_equal(model, found.model, 3, 3, 32, 32)
    assert "blocks.0.attn.qkv.weight" in found.kept


def pruned(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5))
    with torch.no_grad():
        model[0].weight[:16] *= 1e-3
    torch_sap.global_unstructured(model, **settings)
    return model


def test_the_pruned_model_is_unchanged():
    model = pruned(eta_r=0.3, gamma=2.0)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    before, rng = snapshot(model), torch.get_rng_state()
    empty = torch_sap.summary(model).empty_rows["0.weight"]
    found = shrink(model, torch.randn(4, 20, generator=torch.Generator().manual_seed(0)))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert found.removed["0.weight"] >= len(empty) > 0
    assert [module.training for module in found.model.modules()] == [module.training for module in model.modules()]
    assert [name for name, parameter in found.model.named_parameters() if not parameter.requires_grad] == ["4.bias"]
    assert found.model[0].weight.dtype is torch.float32
    model.eval(), found.model.eval()
    x = torch.randn(9, 20)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_frozen_models_and_arguments_of_all_kinds():
    model = emptied(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))).requires_grad_(False)
    for example in (images(2, 5), (images(2, 5),), {"input": images(2, 5)}):
        found = shrink(model, example)
        assert found.removed == {"0.weight": 2}
        assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_nothing_to_remove():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    found = shrink(model, torch.randn(2, 5))
    assert (found.removed, found.kept) == ({}, {})
    assert str(found) == "nothing could be removed"
    assert found.weights_before == found.weights_after == 48


def test_other_outputs_are_noticed(monkeypatch):
    model = emptied(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    monkeypatch.setattr(torch_pruning._Reader, "absorb_", lambda *args: None)
    with torch.no_grad():
        model[0].bias.abs_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the smaller model must compute the same outputs"):
        shrink(model, images(2, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match="must have a parameter to prune"):
        shrink(nn.ReLU(), torch.ones(1))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'torch_sap\[shrink\]'"):
        shrink(nn.Linear(2, 2), torch.ones(1, 2))
