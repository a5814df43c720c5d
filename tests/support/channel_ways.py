"""Models in which the channels of a layer take ways on which they do not stay apart."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(x + self.second(torch.relu(self.first(x))))


class Gated(Residual):
    def forward(self, x):
        return self.last(self.first(x) * torch.sigmoid(self.second(x)))


class Concatenated(Residual):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 2)

    def forward(self, x):
        return self.last(torch.cat([self.first(x), self.second(x)], 1))


class Normalised(Residual):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.last(self.norm(self.first(self.second(x))))


class GivenOut(Residual):
    def forward(self, x):
        middle = self.first(x)
        return self.last(self.second(middle)), middle


class Functional(Residual):
    def __init__(self):
        super().__init__()
        self.inner = nn.ParameterDict({"weight": nn.Parameter(torch.randn(6, 6))})

    def forward(self, x):
        return self.last(nn.functional.linear(self.second(self.first(x)), self.inner["weight"]))


class Twice(Residual):
    def forward(self, x):
        return self.last(self.first(self.first(self.second(x))))


class Softmaxed(Residual):
    def forward(self, x):
        return self.last(self.first(self.second(x)).softmax(1))
