"""Pruned entries are followed, entry by entry, to the operations that receive them."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import convnet, mlp
from torch import nn
from torch.nn.utils import prune
from weighted import Weighted, vector

import torch_sap
from torch_sap import verify


def check_received(model, example, count, share=True):
    """All pruned weights, also those of tables, are received as the masks say, with share in the same proportion."""
    torch_sap.layer_unstructured(model, gamma=3.0, include="*weight*")
    found = verify(model, example)
    assert found.effective
    assert len(found.weights) == count
    for weight in found.weights:
        assert weight.mask_sparsity > 0
        assert weight.reason == ""
        if share:
            assert weight.effective_sparsity == pytest.approx(weight.mask_sparsity, abs=1e-12), weight


MODULES = {
    "linear": (mlp, (torch.randn(3, 6),), 2),
    "convolution": (convnet, (torch.randn(2, 2, 6, 6),), 3),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (torch.randn(1, 6, 5, 5),), 1),
    "bilinear": (lambda: nn.Bilinear(4, 5, 3), (torch.randn(2, 4), torch.randn(2, 5)), 1),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), (torch.randint(9, (2, 3)),), 1),
    "lstm": (lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True), (torch.randn(3, 2, 4),), 8),
    "gru": (lambda: nn.GRU(4, 5), (torch.randn(3, 2, 4),), 2),
    "rnn cell": (lambda: nn.RNNCell(4, 5), (torch.randn(2, 4),), 2),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (vector(), vector(), vector()), 2),
    "attention, other sizes": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        (vector(), vector(4), vector(4)),
        4,
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), (torch.randn(3, 2, 8),), 4),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_modules_of_pytorch_receive_what_the_masks_say(name):
    make, example, count = MODULES[name]
    check_received(make(), example, count)


WAYS = {
    "transposed": lambda m, w, x: x @ w.t(),
    "square, transposed twice": lambda m, w, x: x @ w.t().t(),
    "reshaped": lambda m, w, x: F.conv1d(x.view(3, 2, 4), w.reshape(8, 2, 4)),
    "pieces": lambda m, w, x: torch.cat([F.linear(x, part) for part in w.chunk(3)], 1),
    "joined": lambda m, w, x: F.linear(x, torch.cat([m.other, w, m.other])),
    "stacked": lambda m, w, x: torch.stack([m.other, w]) @ x.t(),
    "expanded": lambda m, w, x: torch.bmm(x.expand(4, 3, 8), w.expand(4, 8, 8)),
    "padded": lambda m, w, x: F.linear(x, F.pad(w, (0, 0, 1, 1), value=1.0)),
    "padded with zeros": lambda m, w, x: F.linear(F.pad(x, (0, 1)), F.pad(w, (0, 1))),
    "rows chosen by the example": lambda m, w, x: x + w[x[:, 0].long()],
    "flipped": lambda m, w, x: F.linear(x, w.flip(0)),
    "rows chosen": lambda m, w, x: F.linear(x, w[torch.arange(8).flip(0)]),
    "copied": lambda m, w, x: F.linear(x, torch.empty_like(w).copy_(w)),
    "masked again": lambda m, w, x: F.linear(x, w.clone().mul_(w != 0)),
    "detached": lambda m, w, x: F.linear(x, w.detach().clone()),
    "cast": lambda m, w, x: F.linear(x.double(), w.double()).float(),
    "scaled": lambda m, w, x: F.linear(x, w * m.other / w.norm()),
    "broadcast": lambda m, w, x: x @ (w * m.other[:2, None]),
    "with numbers about it": lambda m, w, x: F.linear(
        x, w.reshape(-1).div(w.reshape(-1).norm(dim=0, keepdim=True)).view(8, 8)
    ),
    "einsum": lambda m, w, x: torch.einsum("ni,oi->no", x, w),
    "by an activation": lambda m, w, x: x @ (w * x.mean()),
    "element by element": lambda m, w, x: w * x[:, None],
    "of a constant": lambda m, w, x: x + F.linear(m.other[:1], w),
    "autocast": lambda m, w, x: autocast(w, x),
}


def autocast(weight, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, weight)


@pytest.mark.parametrize("way", WAYS)
def test_entries_are_followed_to_where_they_are_received(way):
    check_received(Weighted(WAYS[way]), vector(), 1)


BUCKETS = (torch.arange(8)[:, None] - torch.arange(8)).abs()


def test_a_linear_layer_that_is_read_by_an_index_that_repeats_its_rows():
    """LayoutLMv3's relative positions."""
    check_received(Weighted(lambda m, w, x: x @ (w.t()[BUCKETS] + m.other[0]).sum(-1)), vector(), 1, share=False)


class Reading(nn.Module):
    """A lookup table whose weight is read without a lookup, and what is made of it and an example."""

    def __init__(self, function):
        super().__init__()
        self.table, self.other = nn.Embedding(8, 8), nn.Embedding(8, 8)
        self.value, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.function = function

    def forward(self, x):
        return self.function(self, self.table.weight, x)


TABLES = {
    "the queries of DETR": lambda m, w, x: (
        m.value(torch.zeros_like(w) + m.value(w) + w.unsqueeze(0).repeat(2, 1, 1)) @ x.t()
    ),
    "the queries of Mask2Former": lambda m, w, x: m.value(m.norm(m.other.weight[:8] + w)) @ x.t(),
    "relative positions of DeBERTa": lambda m, w, x: x @ m.value(m.norm(w)).t(),
    "scaled, with sines": lambda m, w, x: x @ (w.double().float() * 3.0 + torch.arange(64.0).view(8, 8).sin()),
    "a row as a token": lambda m, w, x: m.value(torch.where(x > 0, w[3], x)),
    "interpolated": lambda m, w, x: x @ F.interpolate(w.view(1, 1, 8, 8), (4, 4), mode="bilinear").view(2, 8).t(),
    "relative positions of Swin": lambda m, w, x: x @ (w[BUCKETS].sum(-1) + torch.arange(8.0)),
    "by a lookup, twice": lambda m, w, x: m.table(torch.arange(3)) + m.table(torch.arange(3)) * 2,
}


@pytest.mark.parametrize("way", TABLES)
def test_a_table_is_received_as_activations(way):
    model = Reading(TABLES[way])
    torch_sap.layer_unstructured(model, gamma=3.0, include=["table.weight", "other.weight"], exclude="value")
    weights = {weight.name: weight for weight in verify(model, vector()).weights}
    assert weights["table.weight"].revived == 0
    assert weights["table.weight"].effective_sparsity is not None
    if way not in ("a row as a token", "by a lookup, twice", "relative positions of Swin"):
        assert weights["table.weight"].effective_sparsity == pytest.approx(weights["table.weight"].mask_sparsity)
        assert weights["table.weight"].reason == ""


def test_a_table_behind_pytorchs_mask():
    model = Reading(lambda m, w, x: m.norm(m.table(torch.arange(8))))
    prune.random_unstructured(model.table, "weight", amount=0.5)
    (weight,) = [weight for weight in verify(model, vector()).weights if weight.name == "table.weight"]
    assert (weight.mask_sparsity, weight.effective_sparsity, weight.reason) == (0.5, 0.5, "")


def test_a_lookup_in_a_table_of_other_numbers_is_found():
    model = Reading(lambda m, w, x: F.embedding(torch.arange(8), w * 2 + 1))
    torch_sap.layer_unstructured(model, include="table.weight", exclude="value")
    (weight,) = verify(model, vector()).weights
    assert weight.revived == int((~model.table.weight_mask).sum()) > 0
    assert weight.reason == "reparametrized (add)"


@pytest.mark.parametrize(
    "way",
    [
        lambda w, x: F.linear(x, w),
        lambda w, x: x @ w.t(),
        lambda w, x: x @ w.flip(1).t().reshape(16, 4).view(8, 8),
        lambda w, x: [x @ part for part in w.t().contiguous().split(8)],
        lambda w, x: F.linear(x, torch.cat([w, w])[8:]),
        lambda w, x: F.linear(x, w.roll(3)),
    ],
)
@pytest.mark.parametrize("entry", [(0, 3), (5, 2)])
def test_the_very_entry_that_is_revived_is_found(way, entry):
    """One pruned entry gets a value, and then one that is not pruned: the map has to be right entry by entry."""
    model = Weighted(lambda m, w, x: way(w + m.other, x))
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[entry] = False
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(model).prunables, [mask])
    model.other.zero_()
    assert verify(model, vector()).effective
    model.other[entry] = 1.0
    assert verify(model, vector()).weights[0].revived == 1
    model.other.zero_()
    model.other[entry[1], entry[0]] = 1.0
    assert verify(model, vector()).effective


def test_two_weights_in_one_tensor():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_a, self.weight_b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            joined = torch.cat([self.weight_a, self.weight_b])
            return F.linear(x, joined + torch.cat([torch.zeros(8, 8), torch.ones(4, 8)]))

    model = Joined()
    torch_sap.layer_unstructured(model)
    a, b = verify(model, vector()).weights
    assert (a.effective_sparsity, a.reason) == (a.mask_sparsity, "")
    assert (b.effective_sparsity, b.revived) == (0, int((~model.weight_b_mask).sum()))


def test_a_weight_and_its_mask_may_lie_differently_in_memory():
    model = Weighted(lambda m, w, x: F.linear(x, w.t().view(-1).view(8, 8)))
    model.weight = nn.Parameter(torch.randn(8, 8).t())
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[2, 5] = False
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(model).prunables, [mask])
    assert verify(model, vector()).weights[0].effective_sparsity == 1 / 64


def test_a_random_chain_of_moves_keeps_every_entry():
    """Values that are their own position: after any moves the map says PRUNED exactly where the values do."""
    moves = [
        lambda t: t.t(),
        lambda t: t.flip(0),
        lambda t: t.roll(5),
        lambda t: t.reshape(t.shape[1], t.shape[0]),
        lambda t: torch.cat(t.chunk(2)[::-1]),
        lambda t: t[torch.randperm(t.shape[0], generator=torch.Generator().manual_seed(1))],
        lambda t: t.contiguous().clone(),
    ]
    random.seed(0)
    for _ in range(20):
        chain = random.choices(moves, k=5)

        def function(m, w, x, chain=chain):
            for move in chain:
                w = move(w)
            return x[:, :1] @ w.reshape(1, -1)

        model = Weighted(function, size=6)
        model.weight = nn.Parameter(torch.arange(1.0, 25.0).view(6, 4))
        twin = copy.deepcopy(model)
        torch_sap.layer_unstructured(model, gamma=3.0)
        found = verify(model, vector(6))
        assert found.effective
        twin.register_buffer("weight_mask", model.weight_mask)  # a mask that nothing applies
        twin.weight_orig = twin.weight
        del twin._parameters["weight"]
        twin.weight = twin.weight_orig
        assert verify(twin, vector(6)).weights[0].revived == int((~model.weight_mask).sum())
