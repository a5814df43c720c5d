"""A module that computes with a function of its weight: what tests of torch_sap.verify are made of."""

import torch
from torch import nn


def vector(size=8):
    return torch.randn(3, size)


class Weighted(nn.Module):
    """A module that computes with a function of its square weight."""

    def __init__(self, function, size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.register_buffer("other", torch.linspace(0.5, 1.5, size * size).view(size, size))
        self.function = function

    def forward(self, x):
        return self.function(self, self.weight, x)
