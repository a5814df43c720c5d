"""However a weight is read, without its module or the pruned model being called, its pruned entries are zero.

Issue 2, How masks are held: a value written into weight_orig must never reach a computation at a pruned entry.
"""

import torch
from test_inplace_written import Reader, dense_values, each_write
from torch import nn
from torch.nn.functional import linear

from torch_sap import layer_unstructured


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


def check_reader(reader, call, write):
    inputs, masked = torch.randn(4, 6), dense_values(reader.qkv) * reader.qkv.weight_mask
    call(inputs)
    write(reader.qkv)
    torch.testing.assert_close(call(inputs), reader.head(linear(inputs, masked)))


@each_write
def test_a_part_of_the_model_is_called(write):
    """For example forward_features() of a timm model, or model.backbone(x)."""
    model = nn.Sequential(Reader())
    layer_unstructured(model, eta_r=0.5)
    check_reader(model[0], model[0], write)


def check_until_next_step(reader):
    """No hook of PyTorch's sees these reads: a written value is gone after the next optimizer step at the latest."""
    optimizer = torch.optim.SGD(reader.parameters(), lr=0.1)
    with torch.no_grad():
        reader.qkv.weight_orig.fill_(3.0)
    reader.forward(torch.randn(4, 6)).square().mean().backward()
    assert torch.count_nonzero(reader.qkv.weight_orig.grad[~reader.qkv.weight_mask]) == 0
    optimizer.step()
    assert torch.count_nonzero(reader.qkv.weight[~reader.qkv.weight_mask]) == 0
    assert torch.count_nonzero(~reader.qkv.weight_mask) > 0


def test_another_method_than_forward_is_called():
    model = Reader()
    layer_unstructured(model, eta_r=0.5)
    check_until_next_step(model)


def test_the_weight_was_pruned_as_a_pair():
    model = Reader()
    layer_unstructured([(model.qkv, "weight")], eta_r=0.5)
    check_until_next_step(model)


@each_write
def test_a_compiled_model(write):
    torch._dynamo.reset()
    model = Reader()
    layer_unstructured(model, eta_r=0.5)
    check_reader(model, torch.compile(model, backend="eager", fullgraph=True), write)


@each_write
def test_a_model_inside_another_one(write):
    model = Reader()
    layer_unstructured(model, eta_r=0.5)
    check_reader(model, nn.Sequential(model), write)
