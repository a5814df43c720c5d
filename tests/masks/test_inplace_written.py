"""A value written to a pruned entry never reaches a forward, however it got there, and conversions keep the form."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_held, fit, mask_of, masks_of, mlp
from torch import nn

from torch_sap import layer_unstructured


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


def dense_values(module):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(module.weight_mask.shape, generator=generator) + 2


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
    model(torch.randn(4, 6)).square().sum().backward()
    assert torch.count_nonzero(model[0].weight_orig.grad[~mask]) == 0
    assert torch.count_nonzero(model[0].weight_orig.grad[mask]) > 0


@each_write
def test_gradients_of_the_first_backward_after_writing(write):
    model, inputs = pruned_linear(), torch.randn(4, 6)
    write(model[0])
    model(inputs).sum().backward()
    mask = model[0].weight_mask
    assert torch.equal(model[0].weight_orig.grad, inputs.sum(0).expand(9, 6) * mask)


def test_a_loaded_mask_counts_from_the_next_forward():
    model, other, inputs = pruned_linear(), pruned_linear(), torch.randn(4, 6)
    layer_unstructured(other, eta_r=0.3)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(inputs), other(inputs))
    assert torch.equal(mask_of(model, "0.weight"), mask_of(other, "0.weight"))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), (4, 6))
    assert_held(model)


class Reader(nn.Module):
    """Reads a weight without calling its module, as timm's EVA, BEiT and Swin v2 do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 9, bias=False)
        self.head = nn.Linear(9, 4)

    def forward(self, inputs):
        return self.head(nn.functional.linear(inputs, weight=self.qkv.weight))


@each_write
def test_never_reaches_a_forward_of_a_weight_that_is_read_without_its_module(write):
    model, inputs = Reader(), torch.randn(4, 6)
    layer_unstructured(model, eta_r=0.5)
    expected = model.head(inputs @ (dense_values(model.qkv) * model.qkv.weight_mask).t())
    write(model.qkv)
    torch.testing.assert_close(model(inputs), expected)


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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, lambda model: model.to("cpu", torch.bfloat16)])
def test_conversions_keep_the_live_reference(convert, overwrite):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    masks = masks_of(model)
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        convert(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model[0].weight_mask.dtype == torch.bool
    dtype = model[0].weight_orig.dtype
    output = model(torch.randn(5, 6).to(dtype))
    assert output.dtype == dtype
    assert model[0].weight.dtype == dtype
    fit(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), (5, 6))
    assert_held(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())


def test_state_goes_into_a_fresh_model_that_was_pruned_alike():
    model, other = mlp(), mlp()
    layer_unstructured(model, eta_r=0.5)
    layer_unstructured(other, gamma=0.1)
    other.load_state_dict(model.state_dict())
    inputs = torch.randn(5, 6)
    assert torch.equal(other(inputs), model(inputs))
    assert_held(other)


SCRIPT = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
module = model[0]
assert module.weight is module.weight_orig
assert not module.weight_orig.grad[~module.weight_mask].any()
with torch.no_grad():
    module.weight_orig.fill_(1.0)
optimizer.step()
assert not module.weight_orig[~module.weight_mask].any()
"""


def test_a_saved_module_trained_in_a_new_process_keeps_its_zeros(tmp_path):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, optimizer, (5, 6))
    torch.save(model, tmp_path / "model.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
