"""torch.compile of pruned timm models: no graph break, the same losses, and nothing recompiled in later rounds.

The hooks of the outermost module are a graph of their own, which PyTorch runs before that of the module's forward.
"""

import contextlib
import copy
import shutil

import pytest
import torch
from helpers import assert_held, masks_of, mlp, value_of
from timm_training import SHAPE, Hand, batches, each_kind_some_slow, loss_of, make, momentum, plain_step, twins
from torch._dynamo.testing import CompileCounterWithBackend

from torch_sap import SAP, layer_unstructured


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rounds(model, compiled, number=3):
    """Losses of rounds of SAP, trained through a compiled model or the model itself."""
    sap = SAP(model, eta_r=0.1)
    optimizer, dtype = momentum(model), next(model.parameters()).dtype
    for seed in range(number):
        yield [plain_step(compiled, optimizer, inputs.to(dtype), Hand(model)) for inputs in batches(2, seed=seed)]
        assert_held(model, pruned=seed > 0)
        sap.step()


@each_kind_some_slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_no_graph_break_and_no_compilation_in_later_rounds(kind, backend):
    model, twin = (each.double() for each in twins(kind))  # rounding grows from step to step
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found, counts = [], []
    for losses in rounds(model, compiled):
        found.append(losses)
        counts.append(counter.frame_count)
    assert counts[0] <= 2
    assert counts == counts[:1] * 3, "all is compiled in the first round"
    torch.testing.assert_close(found, list(rounds(twin, twin)), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(mask, masks_of(twin)[name]) for name, mask in masks_of(model).items())


@each_kind_some_slow
def test_the_compiled_graph_restores_zeros(kind):
    """A value that is written to a pruned entry between two calls of one graph is not computed with."""
    model = make(kind).eval()
    layer_unstructured(model, eta_r=0.2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = compiled(torch.ones(SHAPE))
        assert torch.equal(model(torch.ones(SHAPE)), expected)
        graphs = counter.frame_count
        for name, mask in masks_of(model).items():
            value_of(model, name).masked_fill_(~mask, 5.0)
        assert torch.equal(compiled(torch.ones(SHAPE)), expected)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("kind", ["efficientnet", "eva"])
def test_compiled_before_the_first_pruning(kind):
    """Then pruning compiles once more, and later rounds do not."""
    model, twin = twins(kind)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = momentum(model), momentum(twin)
    counts = []
    for seed in range(3):
        for inputs in batches(2, seed=seed):
            assert plain_step(compiled, optimizers[0], inputs, Hand(model)) == pytest.approx(
                plain_step(twin, optimizers[1], inputs, Hand(twin)), rel=1e-4
            )
        counts.append(counter.frame_count)
        for each in (model, twin):
            layer_unstructured(each, eta_r=0.1)
    assert 1 == counts[0] < counts[1] == counts[2] <= 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs the package g++, for inductor")
@pytest.mark.parametrize("kind", ["efficientnet", "eva"])
def test_inductor(kind):
    """Losses and gradients of each step, beside those of the model itself in the same state."""
    model, twin = twins(kind)
    for each in (model, twin):
        layer_unstructured(each, eta_r=0.2)
    compiled, optimizer = torch.compile(model, fullgraph=True), momentum(model)
    for seed in range(2):
        for inputs in batches(2, seed=seed):
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            expected = loss_of(twin, inputs)
            expected.backward()
            loss = plain_step(compiled, optimizer, inputs, Hand(model))
            assert loss == pytest.approx(expected.item(), rel=1e-4)
            assert_held(model)
            for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3, msg=name)
        layer_unstructured(model, eta_r=0.1)


def test_gradients_of_compiled_autograd_are_masked():
    module = torch._dynamo.compiled_autograd
    enable = getattr(module, "_enable", None) or module.enable  # PyTorch 2.5
    model = mlp()
    layer_unstructured(model, eta_r=0.2)
    twin, x = copy.deepcopy(model), torch.randn(5, 6)
    optimizers = momentum(model), momentum(twin)
    for number in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            context = enable(torch.compile(backend="eager"))
            with context if each is model else contextlib.nullcontext():
                optimizer.zero_grad()
                each(x).pow(2).mean().backward()
            for module in (each[0], each[-1]):
                assert not module.weight.grad[~module.weight_mask].any()
            optimizer.step()
        if number == 1:
            for each in (model, twin):
                layer_unstructured(each, eta_r=0.2)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)
