"""A value written to a pruned entry never reaches a forward, with or without a call of the weight's module."""

import pytest
import torch
from helpers import assert_held, fit, mask_of
from torch import nn
from torch.nn.functional import linear

from torch_sap import layer_unstructured


def dense_values(module):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(module.weight_mask.shape, generator=generator) + 2


def write_no_grad(module):
    with torch.no_grad():
        module.weight_orig.copy_(dense_values(module))


def write_data(module):
    module.weight_orig.data = dense_values(module)


def write_through_data(module):
    module.weight_orig.data.copy_(dense_values(module))


def write_through_weight(module):
    with torch.no_grad():
        module.weight.copy_(dense_values(module))


def write_state(module):
    module.load_state_dict({**module.state_dict(), "weight_orig": dense_values(module)})


def write_assigned_state(module):
    module.load_state_dict({**module.state_dict(), "weight_orig": dense_values(module)}, assign=True)


WRITES = {
    write.__name__: write
    for write in (
        write_no_grad,
        write_data,
        write_through_data,
        write_through_weight,
        write_state,
        write_assigned_state,
    )
}
each_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


def pruned_linear():
    model = nn.Sequential(nn.Linear(6, 9))
    layer_unstructured(model, eta_r=0.5)
    return model


@each_write
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_never_reaches_a_forward(write, mode, training):
    model, inputs = pruned_linear().train(training), torch.randn(4, 6)
    module = model[0]
    expected = nn.functional.linear(inputs, dense_values(module) * module.weight_mask, module.bias)
    write(module)
    with mode():
        assert torch.equal(model(inputs), expected)


@each_write
def test_training_goes_on_with_zeros(write):
    model = pruned_linear()
    write(model[0])
    mask = mask_of(model, "0.weight").clone()
    fit(model, torch.optim.AdamW(model.parameters(), lr=0.1), (4, 6))
    assert torch.equal(mask_of(model, "0.weight"), mask)
    assert_held(model)


@each_write
def test_gradients_of_the_first_backward_after_writing(write):
    model, inputs = pruned_linear(), torch.randn(4, 6)
    write(model[0])
    model(inputs).sum().backward()
    mask = model[0].weight_mask
    assert torch.equal(model[0].weight_orig.grad, inputs.sum(0).expand(9, 6) * mask)


class Reader(nn.Module):
    """Reads a weight without calling its module, as timm's EVA, BEiT and Swin v2 do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 9, bias=False)
        self.head = nn.Linear(9, 4)

    def forward(self, inputs):
        return self.head(nn.functional.linear(inputs, weight=self.qkv.weight))


@each_write
@pytest.mark.parametrize("training", [True, False])
def test_never_reaches_a_forward_of_attention(write, training):
    model, inputs = (
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)),
        torch.randn(3, 5, 8),
    )
    layer_unstructured(model, eta_r=0.5)
    model.train(training)
    projection = model[0].self_attn.out_proj
    write(projection)
    with torch.no_grad():
        output = model(inputs)
        projection.weight_orig.mul_(projection.weight_mask)
        torch.testing.assert_close(output, model(inputs))


@each_write
@pytest.mark.parametrize("how", ["itself", "as a part", "inside another", "compiled"])
def test_never_reaches_a_forward_of_a_weight_that_is_read_without_its_module(how, write):
    torch._dynamo.reset()
    reader, inputs = Reader(), torch.randn(4, 6)
    layer_unstructured(nn.Sequential(reader) if how == "as a part" else reader, eta_r=0.5)
    call = nn.Sequential(reader) if how == "inside another" else reader
    if how == "compiled":
        call = torch.compile(reader, backend="eager", fullgraph=True)
    call(inputs)
    masked = dense_values(reader.qkv) * reader.qkv.weight_mask
    write(reader.qkv)
    torch.testing.assert_close(call(inputs), reader.head(linear(inputs, masked)))


class ReadThenCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=False)

    def forward(self, inputs):
        return self.fc(linear(inputs, self.fc.weight))


@each_write
def test_a_weight_that_is_read_before_its_module_is_called(write):
    model, inputs = ReadThenCall(), torch.randn(4, 6)
    layer_unstructured(model, eta_r=0.5)
    model(inputs)
    masked = dense_values(model.fc) * model.fc.weight_mask
    write(model.fc)
    torch.testing.assert_close(model(inputs), linear(linear(inputs, masked), masked))


@pytest.mark.parametrize("as_pair", [False, True])
def test_a_read_that_no_hook_sees(as_pair):
    """In model.forward(x), or pruned as a pair: a written value is gone after the next optimizer step at the latest."""
    reader = Reader()
    layer_unstructured([(reader.qkv, "weight")] if as_pair else reader, eta_r=0.5)
    optimizer = torch.optim.SGD(reader.parameters(), lr=0.1)
    with torch.no_grad():
        reader.qkv.weight_orig.fill_(3.0)
    reader.forward(torch.randn(4, 6)).square().mean().backward()
    assert torch.count_nonzero(reader.qkv.weight_orig.grad[~reader.qkv.weight_mask]) == 0
    optimizer.step()
    assert torch.count_nonzero(reader.qkv.weight[~reader.qkv.weight_mask]) == 0
    assert torch.count_nonzero(~reader.qkv.weight_mask) > 0


class Raises(nn.Module):
    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_forward_that_was_ended_leaves_nothing_to_trust(error):
    """The modules inside restore their own zeros again, at the latest after the next forward or optimizer step."""
    model = nn.Sequential(nn.Linear(6, 6), Raises())
    layer_unstructured(model, eta_r=0.5)
    model[1].error = error
    with pytest.raises(type(error)):
        model(torch.ones(2, 6))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model[0].weight_orig.data.fill_(1.0)
    model[0](torch.ones(2, 6))
    assert_held(model)


def test_a_loaded_mask_counts_from_the_next_forward():
    model, other, inputs = pruned_linear(), pruned_linear(), torch.randn(4, 6)
    layer_unstructured(other, eta_r=0.3)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(inputs), other(inputs))
    assert torch.equal(mask_of(model, "0.weight"), mask_of(other, "0.weight"))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), (4, 6))
    assert_held(model)
