"""The copies that torch.nn.DataParallel makes of a pruned model compute with zeros and send masked gradients.

DataParallel needs several GPUs. Here its own ``replicate`` runs, with a broadcast that copies on the CPU, and the
copies run in threads, as there.
"""

import copy
import importlib
import threading

import pytest
import torch
from helpers import assert_held
from torch import nn
from torch.nn.functional import linear

from torch_sap import SAP, layer_unstructured, remove


class Reads(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(linear(x, self.qkv.weight))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.attention = nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.rnn(x[:, None])[0]
        return self.attention(x, x, x)[0]


def standardized():
    layers = pytest.importorskip("timm.layers.std_conv")
    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), layers.StdConv2d(6, 8, 1), nn.Flatten(), nn.Linear(8, 4))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)),
    "read, not called": Reads,
    "recurrent, attention": Recurrent,
    "standardized": standardized,
}


def clones(tensors, devices, detach=False):
    return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]


@pytest.fixture
def replicate(monkeypatch):
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", clones)
    return module.replicate


def in_threads(replicas, parts):
    """Outputs of the copies, which run at the same time."""
    outputs, barrier = [None] * len(parts), threading.Barrier(len(parts))

    def run(number):
        barrier.wait()
        outputs[number] = replicas[number](parts[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(outputs)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_copies_compute_and_learn_like_the_model(make, replicate):
    torch.manual_seed(0)
    model, x = make(), torch.randn(8, 6)
    layer_unstructured(model, eta_r=0.5)
    assert_held(model)
    other = copy.deepcopy(model)
    expected = other(x)
    expected.square().sum().backward()
    for module in model.modules():  # the copies are made before any forward restores the zeros
        for name, mask in module.named_buffers(recurse=False):
            if name.endswith("_mask"):
                module._parameters[name[:-5] + "_orig"].data.masked_fill_(~mask, 7.0)
    for _ in range(2):
        model.zero_grad()
        replicas = replicate(model, [0, 1])
        output = in_threads(replicas, x.chunk(2))
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, same.grad)
            if name.endswith("_orig"):
                assert (parameter.grad[~model.get_buffer(name[:-5] + "_mask")] == 0).all()
    torch.testing.assert_close(model(x), expected)  # nothing of the copies is left behind
    assert_held(model)
    torch.testing.assert_close(remove(model)(x), expected)


def test_the_wrapper_is_pruned_like_any_module():
    model = nn.DataParallel(MODELS["mlp"]())
    sap = SAP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        found = sap.step()
    assert found.remaining < found.total
    assert [tensor.name for tensor in found.tensors] == ["module.0.weight", "module.2.weight"]
    assert_held(model)
