"""Random models for the fuzz test: trees of layers of every kind that bring their own inputs."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

FULL = [torch.float32, torch.float64]
EVERY = [*FULL, torch.bfloat16, torch.float16]


class Inner(nn.Module):
    """Weights that are shared, or read without a call of their module."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "tied":
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
        else:
            make = {"lstm": lambda: nn.LSTM(3, 2), "attention": lambda: nn.MultiheadAttention(4, 2)}
            self.inner = make.get(kind, lambda: nn.Linear(4, 3))()

    def forward(self, x):
        if self.kind == "tied":
            return self.head(self.embedding(x))
        if self.kind == "reader":  # as timm's BEiT does
            return F.linear(x, self.inner.weight)
        return self.inner(x)[0] if self.kind == "lstm" else self.inner(x, x, x, need_weights=False)[0]


KINDS = {  # how to make it, the shape of its input, the types that it computes with on a CPU
    "linear": (lambda: nn.Linear(5, 7), (3, 5), EVERY),
    "no inputs": (lambda: nn.Linear(0, 3), (2, 0), FULL),
    "no outputs": (lambda: nn.Linear(3, 0), (2, 3), FULL),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 2, 5), FULL),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5), FULL),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3), FULL),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3), FULL),
    "embedding": (lambda: nn.Embedding(6, 4), (), EVERY),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), (2, 3), FULL),
    "normed": (lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), (4, 3), FULL),
    "lstm": (lambda: Inner("lstm"), (3, 2, 3), FULL),
    "attention": (lambda: Inner("attention"), (3, 2, 4), FULL),
    "tied": (lambda: Inner("tied"), (), FULL),
    "reader": (lambda: Inner("reader"), (3, 4), FULL),
}
VALUES = {
    "normal": lambda weight: weight,
    "ties": lambda weight: (2 * weight / weight.abs().max().clamp(min=1e-3)).round() / 2,
    "equal": lambda weight: torch.full_like(weight, 0.25) * weight.sign(),
    "zero": torch.zeros_like,
    "half zero": lambda weight: weight.clamp(min=0),
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda weight: weight.movedim(1, -1).contiguous().movedim(-1, 1),
}


@dataclass(frozen=True)
class Leaf:
    """One layer: its kind, its type, its weights, and whether it trains."""

    kind: str
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    frozen: bool = False
    seed: int = 0


class Layer(nn.Module):
    """A layer with its own input, so that any tree of layers computes."""

    def __init__(self, leaf):
        super().__init__()
        make, self.shape, _ = KINDS[leaf.kind]
        torch.manual_seed(leaf.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.layer = make().to(leaf.dtype)
        for name, parameter in self.layer.named_parameters():
            if "weight" in name and parameter.dim() > 1 and parameter.numel():
                parameter.data = VALUES[leaf.values](parameter.data)
        self.layer.requires_grad_(not leaf.frozen)

    def forward(self):
        dtype = next(self.parameters()).dtype
        if not self.shape:
            return self.layer(torch.tensor([[0, 3], [4, 4]])).double().flatten()
        x = torch.linspace(-1, 1, torch.Size(self.shape).numel(), dtype=torch.float64).reshape(self.shape).to(dtype)
        inputs = (x[:, :2], x) if isinstance(self.layer, nn.Bilinear) else (x,)
        return self.layer(*inputs).double().flatten()


class Tree(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self):
        return torch.cat([branch() for branch in self.branches])


def build(tree):
    """Build the model of nested lists of leaves; the same leaf object in two places is one module."""
    made = {}

    def grow(part):
        if not isinstance(part, Leaf):
            return Tree(grow(branch) for branch in part)
        if id(part) not in made:
            made[id(part)] = Layer(part)
        return made[id(part)]

    return grow(tree)


def of_kind(kind):
    types, values = st.sampled_from(KINDS[kind][2]), st.sampled_from(sorted(VALUES))
    return st.builds(Leaf, st.just(kind), types, values, st.sampled_from([False, False, True]), st.integers(0, 99))


leaves = st.sampled_from(sorted(KINDS)).flatmap(of_kind)


@st.composite
def trees(draw):
    """A tree of one to six layers, one of them perhaps in two places, with a layer that can be pruned and trained."""
    found = [Leaf("linear", seed=draw(st.integers(0, 99))), *draw(st.lists(leaves, max_size=5))]
    if draw(st.booleans()):
        found.append(found[0])
    cut = draw(st.integers(0, len(found)))
    return [[*found[:cut]], *found[cut:]] if cut else found


CHOICES = {"p": [0.1, 0.5, 0.9], "q": [1.0, 2.0], "eta_r": [0.0, 0.1, 10.0], "gamma": [0.0, 0.5, 1.0, 3.0]}
CHOICES |= {"beta": [0.0, 0.3, 0.9, 1.0]}
rules = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})
