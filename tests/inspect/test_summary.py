"""summary: counts, PQI and MACs against independent ones, and a model that is left as it was."""

import json
import math

import pytest
import torch
from helpers import convnet, mask_of, mlp, zoo
from reference import pq_index as reference_pq_index
from timm_training import make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_sap
from torch_sap import summary


def flops(model, example):
    """What PyTorch's own counter gives, with attention and recurrent layers in operations that it knows."""
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        torch.backends.mkldnn.enabled = True
    return counter.get_total_flops()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


class Often(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.linear(self.linear(x)))


IMAGES = torch.randn(2, 3, 32, 32)
MODELS = {
    "mlp": (mlp, torch.randn(3, 6), {"0.weight": 3 * 54, "3.weight": 3 * 36}, 0),
    "convnet": (convnet, torch.randn(3, 2, 6, 6), {"0.weight": 3 * 16 * 108, "3.weight": 3 * 4 * 108}, 0),
    "shared": (Tied, torch.arange(5), {"embedding.weight": 5 * 72}, 0),
    "called three times": (Often, torch.randn(2, 8), {"linear.weight": 3 * 2 * 64}, 0),
    "lstm": (lambda: nn.LSTM(8, 4), torch.randn(5, 3, 8), {"weight_ih_l0": 15 * 128, "weight_hh_l0": 15 * 64}, 0),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.randn(2, 5, 8),
        {"self_attn.in_proj_weight": 10 * 192, "self_attn.out_proj.weight": 10 * 64, "linear1.weight": 10 * 128},
        2 * 2 * 5 * 5 * 8,
    ),
    "eva": (lambda: make("eva"), IMAGES, {"blocks.0.attn.qkv.weight": 2 * 17 * 16 * 48}, 2 * 2 * 2 * 17 * 17 * 16),
    "resnet": (lambda: make("resnet"), IMAGES, {}, 0),
    "efficientnet": (lambda: make("efficientnet"), IMAGES, {}, 0),
    "vit": (lambda: make("vit"), IMAGES, {}, None),
}
each_model = pytest.mark.parametrize("kind", MODELS)


@each_model
@pytest.mark.parametrize("pruned", [False, True])
def test_macs_are_those_of_pytorchs_counter(kind, pruned):
    build, example, of_weights, others = MODELS[kind]
    model = build()
    if pruned:
        torch_sap.layer_unstructured(model, gamma=3.0)
    found = summary(model, example)
    assert found.macs == flops(model, example) // 2 > 0
    by_name = {layer.name: layer for layer in found.tensors}
    for name, macs in of_weights.items():
        assert by_name[name].macs == macs, name
    if others is not None:
        assert found.other_macs == others
    for layer in found.tensors:
        assert layer.sparse_macs == round(layer.macs * int(mask_of(model, layer.name).sum()) / layer.total)
    assert found.sparse_macs == found.other_macs + sum(layer.sparse_macs for layer in found.tensors)
    assert (found.sparse_macs < found.macs) == pruned


@pytest.mark.parametrize("form", ["dense", "pruned"])
def test_counts_and_index_against_the_reference(form):
    model = zoo()
    if form == "pruned":
        torch_sap.layer_unstructured(model, gamma=2.0)
    found = summary(model)
    assert found.macs is found.sparse_macs is found.other_macs is None
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    kept = {layer.name: mask_of(model, layer.name) for layer in found.tensors}
    assert found.total == sum(mask.numel() for mask in kept.values())
    assert found.remaining == sum(int(mask.sum()) for mask in kept.values())
    for layer in found.tensors:
        module = model.get_submodule(layer.name.rpartition(".")[0])
        mask = kept[layer.name]
        assert (layer.module, layer.shape) == (type(module).__name__, tuple(module.weight.shape))
        assert (layer.total, layer.remaining) == (mask.numel(), int(mask.sum()))
        values = module.weight.detach()[mask].double().numpy()
        assert layer.pqi == pytest.approx(reference_pq_index(values, 0.5, 1.0), rel=1e-12)


def test_removing_the_masks_keeps_the_counts():
    model = convnet()
    torch_sap.layer_unstructured(model, gamma=3.0)
    before = summary(model)
    after = summary(torch_sap.remove(model))
    assert [layer.remaining for layer in after.tensors] == [layer.remaining for layer in before.tensors]
    assert after.remaining < after.total


def test_empty_rows_are_output_channels():
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "transposed": nn.ConvTranspose2d(4, 6, 2, groups=2)})
    torch_sap.layer_unstructured(model, gamma=0.0)
    model["linear"].weight_mask[[1, 3]] = False
    model["transposed"].weight_mask[:2, 1] = False  # channel 1, of the first group
    model["transposed"].weight_mask[2:, 2] = False  # channel 5, of the second
    found = summary(model)
    assert found.empty_rows == {"linear.weight": (1, 3), "transposed.weight": (1, 5)}


def test_settings_are_put_back_though_the_model_fails():
    with pytest.raises(RuntimeError):
        summary(mlp(), torch.randn(3, 7))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_in_a_terminal_in_a_notebook_and_as_values():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    torch_sap.layer_unstructured(model)
    with torch.no_grad():
        model[2].weight.zero_()
    found = summary(model, torch.ones(1, 64))
    lines = str(found).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    kept = int(model[0].weight_mask.sum())
    assert lines[2].split() == [
        *["0.weight", "Linear", "(32,", "64)", "2,048", f"{kept:,}", f"{100 * kept / 2048:.1f}"],
        *[f"{found.tensors[0].pqi:.3f}", "0", "2.048k", f"{kept / 1000:.4g}k"],
    ]
    assert "undefined" in lines[3]
    assert lines[-1].startswith("total")
    assert lines[0].split()[3:7] == ["weights", "remaining", "remaining", "%"]
    assert f"<td>{kept:,}</td><td>{100 * kept / 2048:.1f}</td>" in found._repr_html_()
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["tensors"][1]["pqi"] is None
    assert math.isnan(found.tensors[1].pqi)
    assert (values["tensors"][0]["remaining"], values["sparse_macs"]) == (kept, found.sparse_macs)
    assert values["tensors"][0]["sparsity"] == found.tensors[0].sparsity == 1 - kept / 2048


def test_names_are_escaped_in_a_notebook():
    model = nn.ModuleDict({"<b>": nn.Linear(3, 4)})
    assert "&lt;b&gt;.weight" in summary(model)._repr_html_()


def test_a_note_says_what_has_no_weight():
    build, example, _, others = MODELS["transformer"]
    note = str(summary(build(), example)).splitlines()[-1]
    assert note == f"{others} of the MACs are without a weight (as in attention)"


def test_what_is_refused():
    with pytest.raises(ValueError, match="must have a parameter to prune"):
        summary(nn.ReLU())
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0.weight of shape \(9, 6\) has NaN entries"):
        summary(model)


def test_a_layer_without_entries_costs_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(1, 2))
    model[1].weight, model[1].bias = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(0))
    model[2].weight = nn.Parameter(torch.ones(2, 0))
    found = summary(model, torch.ones(1, 4))
    assert [tensor.macs for tensor in found.tensors] == [12, 0, 0]


def test_inference_mode_makes_no_difference():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = summary(model, torch.ones(2, 3, 8)).macs
    with torch.inference_mode():
        assert summary(model, torch.ones(2, 3, 8)).macs == expected > 0
