"""Random entries, scopes and rules: what the backends for devices are compared with the CPU's on."""

import random

import torch
from helpers import SCOPES

from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry
from torch_sap.decide.keys import INTEGER_OF

DTYPES = list(INTEGER_OF)
RULES = [
    Hyperparameters(),
    Hyperparameters(eta_r=0.3, beta=0.5),
    Hyperparameters(1.0, 2.0, gamma=3.0),
    Hyperparameters(0.3, 0.7, eta_r=0.1),
    Hyperparameters(0.1, 1.9, gamma=0.4),
    FixedRatio(ratio=0.4),
]
SMALL = {"ROWS": 4, "WIDTH": 16, "STEPS": 2, "BLOCK": 64, "BLOCKS": 2, "ROW_BLOCK": 32}
"""Sizes with which small tensors, too, take several programs and steps."""


def gaps(shape):
    """A tensor with gaps in its memory, at an odd address."""
    return torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]


KINDS = {
    "linear": lambda: Entry("", torch.randn(9, 7)),
    "long rows": lambda: Entry("", torch.randn(3, 2311)),
    "many rows": lambda: Entry("", torch.randn(19, 5)),
    "vector": lambda: Entry("", torch.randn(17)),
    "one": lambda: Entry("", torch.randn(1, 1)),
    "conv": lambda: Entry("", torch.randn(5, 3, 3, 3)),
    "channels_last": lambda: Entry("", torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last)),
    "transposed": lambda: Entry("", torch.randn(6, 4, 2, 2), channel_dim=1, channel_groups=2),
    "transposed last": lambda: Entry(
        "", torch.randn(6, 4, 3, 2).contiguous(memory_format=torch.channels_last), channel_dim=1
    ),
    "in by out": lambda: Entry("", torch.randn(6, 19), channel_dim=1),
    "not contiguous": lambda: Entry("", torch.randn(7, 8).t()),
    "gaps": lambda: Entry("", gaps((3, 4, 5))),
    "scattered": lambda: Entry("", torch.randn(4, 5, 6, 7).permute(2, 0, 3, 1)[:, 1:, ::2]),
    "experts": lambda: Entry("", torch.randn(3, 4, 5), experts=3),
    "experts in by out": lambda: Entry("", torch.randn(3, 4, 5), experts=3, channel_dim=1),
    "stacked experts": lambda: Entry("", torch.randn(6, 5), experts=3),
    "empty": lambda: Entry("", torch.randn(0, 4)),
    "empty rows": lambda: Entry("", torch.randn(3, 0)),
    "zero": lambda: Entry("", torch.zeros(4, 5)),
    "odd address": lambda: Entry("", torch.randn(41)[1:].view(5, 8)),
}


def fill(scores, how):
    if how == "ties":
        return scores.mul(2).round()
    if how == "equal":
        return scores.sign().mul(0.3)
    if how == "some zeros":
        return scores * (torch.rand(scores.shape) < 0.5)
    return scores


def random_case(seed):
    """Entries, scope and rule of a case, and whether to take it with SMALL sizes."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    scope = SCOPES[seed % 3]
    dtypes = DTYPES if chosen.random() < 0.15 else [DTYPES[seed // 3 % 4]]
    entries = []
    for number in range(chosen.choice([1, 2, 3])):
        kind = chosen.choice(list(KINDS))
        entry = KINDS["linear" if scope == "neuron" and kind == "vector" else kind]()
        scores = fill(entry.scores, chosen.choice(["", "ties", "equal", "some zeros"])).to(chosen.choice(dtypes))
        if kind in ("gaps", "scattered", "not contiguous", "odd address"):  # which arithmetic does not keep
            entry.scores.copy_(scores.float())
            scores = entry.scores if scores.dtype is torch.float32 else scores
        mask = None
        if chosen.random() < 0.6:
            mask = torch.rand(scores.shape) < chosen.choice([0.05, 0.7])
            if chosen.random() < 0.7:
                mask = torch.empty_like(scores, dtype=torch.bool).copy_(mask)  # in the same order of memory
        fields = {name: getattr(entry, name) for name in ("channel_dim", "channel_groups", "experts")}
        entries.append(Entry(f"{number} {kind}", scores, mask, **fields))
    small = chosen.random() < 0.4 and all(entry.scores.numel() < 200 for entry in entries)
    return entries, scope, chosen.choice(RULES), small
