"""Random models for the fuzz tests: trees of layers of every kind, each of which computes a few numbers of its own."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

FULL = [torch.float32, torch.float64]
EVERY = [*FULL, torch.bfloat16, torch.float16]


class Reader(nn.Module):
    """Reads the weight of a module inside it without calling that module, as timm's BEiT does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.inner.weight)


class Tied(nn.Module):
    """An embedding and a head that share one weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, numbers):
        return self.head(self.embedding(numbers))


class Attention(nn.Module):
    """nn.MultiheadAttention, whose out_proj is read without being called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(3, 2)

    def forward(self, x):
        return self.inner(x)[0]


KINDS = {  # how to make it, the shape of its input, the types that it computes with on a CPU
    "linear": (lambda: nn.Linear(5, 7), (3, 5), EVERY),
    "scalar": (lambda: nn.Linear(1, 1), (2, 1), EVERY),
    "no inputs": (lambda: nn.Linear(0, 3), (2, 0), FULL),
    "no outputs": (lambda: nn.Linear(3, 0), (2, 3), FULL),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 2, 5), FULL),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5), FULL),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), FULL),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3), FULL),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), FULL),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3), FULL),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 5, 2), (2, 3, 4), FULL),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 2, 2, 2), FULL),
    "embedding": (lambda: nn.Embedding(6, 4), (), EVERY),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), (2, 3), FULL),
    "normed": (lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), (4, 3), FULL),
    "lstm": (Recurrent, (3, 2, 3), FULL),
    "attention": (Attention, (3, 2, 4), FULL),
    "tied": (Tied, (), FULL),
    "reader": (Reader, (3, 4), FULL),
}
VALUES = {
    "normal": lambda weight: weight,
    "ties": lambda weight: (2 * weight / weight.abs().max().clamp(min=1e-3)).round() / 2,
    "equal": lambda weight: torch.full_like(weight, 0.25) * weight.sign(),
    "zero": torch.zeros_like,
    "half zero": lambda weight: weight.clamp(min=0),
    "tiny": lambda weight: weight * 1e-4,
    "large": lambda weight: weight * 100,
}
LAYOUTS = ["as made", "transposed", "channels last"]


@dataclass(frozen=True)
class Leaf:
    """One layer: its kind, its type, what its weights are like, and where they lie in memory."""

    kind: str
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "as made"
    frozen: bool = False
    seed: int = 0


class Layer(nn.Module):
    """A layer that brings its own input, so that layers can be put together in any tree."""

    def __init__(self, leaf):
        super().__init__()
        make, self.shape, _ = KINDS[leaf.kind]
        torch.manual_seed(leaf.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.layer = make().to(leaf.dtype)
        for name, parameter in self.layer.named_parameters():
            if "weight" in name and parameter.dim() > 1 and parameter.numel():
                parameter.data = _lay(VALUES[leaf.values](parameter.data), leaf.layout)
        self.layer.requires_grad_(not leaf.frozen)

    def forward(self):
        dtype = next(self.parameters()).dtype
        if not self.shape:
            return self.layer(torch.tensor([[0, 3], [4, 4]])).double().flatten()
        x = torch.linspace(-1, 1, max(torch.Size(self.shape).numel(), 1), dtype=torch.float64)
        x = x[: torch.Size(self.shape).numel()].reshape(self.shape).to(dtype)
        inputs = (x[:, :2], x) if isinstance(self.layer, nn.Bilinear) else (x,)
        return self.layer(*inputs).double().flatten()


def _lay(weight, layout):
    if layout == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last" and weight.dim() == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight


class Tree(nn.Module):
    """What its branches compute, one after the other."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self):
        return torch.cat([branch() for branch in self.branches])


def build(tree):
    """The model of a tree: lists of lists and leaves. A leaf that comes twice, as one object, is one module."""
    made = {}

    def grow(part):
        if not isinstance(part, Leaf):
            return Tree(grow(branch) for branch in part)
        if id(part) not in made:
            made[id(part)] = Layer(part)
        return made[id(part)]

    return grow(tree)


@st.composite
def leaves(draw):
    """One layer of any kind."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    return Leaf(
        kind,
        draw(st.sampled_from(KINDS[kind][2])),
        draw(st.sampled_from(sorted(VALUES))),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([False, False, False, True])),
        draw(st.integers(0, 99)),
    )


@st.composite
def trees(draw):
    """A tree of one to six layers, of which one may be at two places, with a layer that can be pruned and trained."""
    found = [Leaf("linear", seed=draw(st.integers(0, 99))), *draw(st.lists(leaves(), max_size=5))]
    if draw(st.booleans()):
        found.append(found[0])
    cut = draw(st.integers(0, len(found)))
    return [[*found[:cut]], *found[cut:]] if cut else found


@st.composite
def rules(draw):
    """Hyper-parameters of one pruning."""
    p, q = draw(st.sampled_from([(0.5, 1.0), (1.0, 2.0), (0.1, 1.9), (0.3, 0.7), (0.9, 1.0)]))
    return {
        "p": p,
        "q": q,
        "eta_r": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 10.0])),
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0])),
        "beta": draw(st.sampled_from([0.0, 0.3, 0.9, 0.9, 1.0])),
    }
