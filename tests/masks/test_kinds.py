"""Which parameters are weights, and where their output channels are, by the kind of the module."""

import warnings

import numpy as np
import pytest
import torch
from helpers import FUNCTIONS, SCOPES, masks_of, of_package
from torch import nn

from torch_sap import SAP, global_unstructured, layer_unstructured, neuron_unstructured, prunable_parameters, remove
from torch_sap.decide.backends import NUMPY, TORCH
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry
from torch_sap.decide.step import prune_step
from torch_sap.masks.kinds import COLUMNS, ROWS, kind_of, kind_on_disk
from torch_sap.masks.parameters import LeftOut

each_scope = pytest.mark.parametrize("scope", SCOPES)


def stack(columns, experts=4, outputs=6, inputs=5, seed=0):
    """The matrices (output, input) of some experts, and one module that stacks them."""
    matrices = torch.randn(experts, outputs, inputs, generator=torch.Generator().manual_seed(seed))
    held = matrices.transpose(1, 2).contiguous() if columns else matrices.clone()
    return matrices, of_package("transformers", "NewExperts", up_proj=held, is_transposed=columns)


def apart(matrices):
    """The same experts as linear layers."""
    layers = nn.ModuleList(nn.Linear(m.shape[1], m.shape[0], bias=False) for m in matrices)
    with torch.no_grad():
        for layer, matrix in zip(layers, matrices, strict=True):
            layer.weight.copy_(matrix)
    return layers


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_a_stack_is_pruned_as_its_matrices_are_apart(scope, columns):
    matrices, stacked = stack(columns)
    layers = apart(matrices)
    for _ in range(3):
        report, other = FUNCTIONS[scope](stacked, eta_r=0.1), FUNCTIONS[scope](layers, eta_r=0.1)
        for field in ("d", "c", "index", "r"):
            found = getattr(report.groups["up_proj"], field)
            expected = np.concatenate([getattr(group, field) for group in other.groups.values()])
            np.testing.assert_allclose(found, expected, rtol=1e-14 if columns else 0)  # rows are summed apart
        mask = stacked.up_proj_mask.transpose(1, 2) if columns else stacked.up_proj_mask
        assert torch.equal(mask, torch.stack([layer.weight_mask for layer in layers]))
        assert report.remaining == other.remaining == int(mask.sum())


@pytest.mark.parametrize("columns", [False, True])
def test_the_global_scope_takes_a_stack_as_any_tensor(columns):
    _, stacked = stack(columns)
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = nn.Parameter(stacked.up_proj.detach().clone())
    report, other = global_unstructured(stacked), global_unstructured(plain)
    assert report.pruned == other.pruned > 0
    assert torch.equal(stacked.up_proj_mask, plain.weight_mask)


@each_scope
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacks_on_both_backends(scope, dims, columns, dtype):
    """Ties, an expert of zeros, one of a single magnitude, earlier masks; dense and strided memory."""
    scores = torch.randint(-4, 5, (5, 8, 6), generator=torch.Generator().manual_seed(1)).to(dtype)
    scores[1] = 0
    scores[2] = 3
    mask = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    if dims == 2:
        scores, mask = scores.flatten(0, 1), mask.flatten(0, 1)
    results = []
    for backend in (NUMPY, TORCH):
        for strided in (False, True):
            held = scores.t().contiguous().t() if strided and dims == 2 else scores
            held = scores.transpose(1, 2).contiguous().transpose(1, 2) if strided and dims == 3 else held
            entry = Entry("stack", held, mask, channel_dim=int(columns), experts=5)
            found = prune_step([entry], scope, Hyperparameters(eta_r=0.3), backend=backend)
            results.append((found.masks[0], found.remaining, {k: vars(v) for k, v in found.groups.items()}))
    first = results[0]
    assert first[1] == [int(first[0].sum())]
    assert first[1][0] < int(mask.sum())
    for other in results[1:]:
        assert torch.equal(first[0], other[0])
        assert first[1] == other[1]
        for name, values in first[2].items():
            for field in ("d", "c"):
                np.testing.assert_array_equal(values[field], other[2][name][field])
    if scope == "layer":
        assert len(first[2]["stack"]["c"]) == 5
        assert first[2]["stack"]["c"][1] == 0, "an expert of zeros loses nothing"


def test_dbrx_stacks_experts_in_two_dimensions():
    glu = of_package("transformers", "DbrxExpertGLU", moe_num_experts=3, w1=torch.randn(12, 5), w2=torch.randn(12, 5))
    assert {n: len(g.c) for n, g in layer_unstructured(glu).groups.items()} == {"w1": 3, "w2": 3}
    assert {n: len(g.c) for n, g in neuron_unstructured(glu).groups.items()} == {"w1": 12, "w2": 15}


@pytest.mark.parametrize(
    ("package", "name", "parameter", "shape", "rows"),
    [
        ("transformers", "Conv1D", "weight", (5, 7), 7),
        ("transformers_modules", "Conv1D", "weight", (5, 7), 7),
        ("somebody", "Conv1D", "weight", (5, 7), 5),
        ("transformers", "Llama4TextExperts", "gate_up_proj", (3, 5, 7), 21),
        ("transformers", "JetMoeParallelExperts", "weight", (3, 5, 7), 15),
        ("transformers", "Gemma3MultiModalProjector", "mm_input_projection_weight", (5, 7), 7),
        ("torchtune", "GroupedExperts", "gate_proj", (3, 5, 7), 21),
        ("torchtitan", "GroupedExperts", "w3", (3, 5, 7), 15),
        ("torch_geometric", "RGCNConv", "weight", (3, 5, 7), 21),
        ("torch_geometric", "RGCNConv", "root", (5, 7), 7),
        ("torch_geometric", "RGATConv", "weight", (3, 5, 7), 21),
        ("torch_geometric", "GCN2Conv", "weight1", (5, 7), 7),
        ("torch_geometric", "Linear", "weight", (5, 7), 5),
        ("torch_geometric", "Linear", "weight", (3, 5, 7), 21),
        ("diffusers", "SwiGLUExperts", "gate_up_proj", (3, 5, 7), 21),
        ("open_clip", "CLIP", "text_projection", (5, 7), 7),
        ("open_clip", "VisionTransformer", "proj", (5, 7), 7),
        ("transformers", "XCLIPModel", "prompts_visual_projection", (5, 7), 7),
        ("transformers", "Inkling2DynamicShortConvolution", "static_weight", (4, 7), 7),
    ],
)
def test_rows_of_known_kinds(package, name, parameter, shape, rows):
    report = neuron_unstructured(of_package(package, name, **{parameter: torch.randn(shape)}))
    assert [len(group.d) for group in report.groups.values()] == [rows]


def test_rows_of_torchs_own_modules():
    assert kind_of(nn.ConvTranspose2d(6, 4, 2, groups=2), "weight", (6, 2, 2, 2)) == (1, 2, 0)
    for module in (nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Bilinear(1, 1, 1), nn.LSTM(1, 1), nn.GRUCell(1, 1)):
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                assert kind_of(module, name, tuple(parameter.shape)) == ROWS, (module, name)
    assert len(prunable_parameters(nn.MultiheadAttention(8, 2, kdim=3, vdim=5))) == 4


class Odd(nn.Module):
    """Everything that the rule leaves out, beside one linear layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.bags = nn.EmbeddingBag(3, 4)
        self.norm = nn.LayerNorm((2, 4))
        self.grn = of_package("convnext", "GRN", weight=torch.randn(1, 1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.head = nn.Linear(4, 60)

    def forward(self, x):
        return self.head(x)


REASONS = {
    "position": 'no "weight" in its name',
    "token": "a vector",
    "tokens.weight": "a lookup table",
    "bags.weight": "a lookup table",
    "norm.weight": "a norm scale",
    "norm.bias": "a bias",
    "grn.weight": "a vector",
}


@each_scope
def test_what_is_left_out_and_why(scope):
    model = Odd()
    report = FUNCTIONS[scope](model)
    assert [tensor.name for tensor in report.tensors] == ["head.weight"]
    assert {one.name: one.reason for one in report.left_out} == REASONS
    assert str(report).splitlines()[-1] == (
        '  left out: position (no "weight" in its name), token and 1 more (a vector), tokens.weight and 1 more '
        "(a lookup table), norm.weight (a norm scale), norm.bias (a bias)"
    )
    assert report.to_dict()["left_out"][0] == {"name": "position", "shape": [1, 5, 4], "reason": REASONS["position"]}
    assert {one.name for one in SAP(Odd()).left_out} == set(REASONS)


def test_include_and_exclude():
    def names(**patterns):
        model = Odd()
        paths = {module: path for path, module in model.named_modules()}
        return [f"{paths[m]}.{name}".removeprefix(".") for m, name in prunable_parameters(model, **patterns)]

    assert names(include="tokens") == ["tokens.weight", "head.weight"]
    assert names(include=["pos*", "grn.weight"]) == ["position", "grn.weight", "head.weight"]
    assert names(include="*", exclude="head") == ["position", "token", *(n for n in REASONS if "." in n)]
    model = Odd()
    report = layer_unstructured(model, include="position", exclude="head")
    assert int(model.position_mask.sum()) == report.remaining < 20
    assert ("head.weight", "excluded") in {(one.name, one.reason) for one in report.left_out}
    assert not [one.name for one in report.left_out if one.name == "position"]
    with pytest.raises(
        ValueError, match="include must match a parameter with more than one dimension, but 'bias' match"
    ):
        prunable_parameters(Odd(), include="bias")
    with pytest.raises(ValueError, match="include needs a model"):
        layer_unstructured([(Odd().head, "weight")], include="head")
    sap = SAP(Odd(), include="tokens.weight")
    assert [one.name for one in sap.prunables] == ["tokens.weight", "head.weight"]


def test_a_table_that_a_linear_layer_shares_is_pruned():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["tokens"].weight
    report = neuron_unstructured(model, eta_r=0.3)
    assert [tensor.name for tensor in report.tensors] == ["tokens.weight"]
    assert len(report.groups["tokens.weight"].d) == 9
    assert model["head"].weight is model["tokens"].weight


def test_much_that_is_left_out_for_no_reason_is_warned_of():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8))
            self.small = nn.Parameter(torch.randn(2, 2))
            self.head = nn.Linear(8, 8)

    text = (
        r"52% of the matrix entries of Custom are not pruned, .* in their names: kernel, small\. Name them in include="
    )
    with pytest.warns(UserWarning, match=text) as caught:
        layer_unstructured(Custom())
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=text) as caught:
        SAP(Custom())
    assert caught[0].filename.endswith("pruner.py") or caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_unstructured(Custom(), include="kernel")
        layer_unstructured(Custom(), exclude="kernel")


# ---- tensors that are zero throughout


@each_scope
@pytest.mark.parametrize("kind", ["LoRA's B", "zero convolution", "head"])
def test_a_tensor_of_zeros_stays_and_learns(scope, kind):
    torch.manual_seed(0)
    make = {"LoRA's B": nn.Linear(6, 6), "zero convolution": nn.Conv1d(6, 6, 1), "head": nn.Linear(6, 2)}
    zero = make[kind]
    nn.init.zeros_(zero.weight)
    model = nn.Sequential(nn.Conv1d(6, 6, 1) if kind == "zero convolution" else nn.Linear(6, 6), nn.Tanh(), zero)
    report = FUNCTIONS[scope](model, eta_r=0.5)
    assert report.left_out == [LeftOut("2.weight", tuple(zero.weight.shape), "zero throughout")]
    assert zero.weight_mask.all()
    assert not model[0].weight_mask.all()
    if scope == "global":
        assert report.groups["global"].d.tolist() == [36]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6, 3) if kind == "zero convolution" else torch.randn(4, 6)
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    assert (zero.weight != 0).all()
    again = FUNCTIONS[scope](model, eta_r=0.5)
    assert again.left_out == []
    assert not zero.weight_mask.all(), "from then on it is a weight like others"


def test_zeros_throughout_do_not_change_what_others_lose():
    torch.manual_seed(0)
    alone, beside = nn.Sequential(nn.Linear(20, 20)), nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 50))
    beside[0].load_state_dict(alone[0].state_dict())
    nn.init.zeros_(beside[1].weight)
    assert global_unstructured(alone).pruned == global_unstructured(beside).pruned
    assert torch.equal(alone[0].weight_mask, beside[0].weight_mask)
    sap = SAP(remove(beside), scope="global")
    assert sap.step().pruned_count > 0
    assert beside[1].weight_mask.all()


# ---- Parameters that share memory


@pytest.mark.parametrize("how", ["transposed", "rows", "all of it", "one dimension"])
def test_parameters_that_share_memory_are_refused(how):
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    views = {
        "transposed": first.weight.t(),
        "rows": first.weight[:3],
        "all of it": first.weight.detach(),
        "one dimension": first.weight.detach().view(4, 9),
    }
    second.weight = nn.Parameter(views[how])
    model = nn.Sequential(first, second)
    before = first.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"(0|1)\.weight and (0|1)\.weight share memory, but are two Parameters; use one"
    ):
        layer_unstructured(model)
    assert torch.equal(first.weight, before)
    assert not hasattr(first, "weight_mask")
    layer_unstructured(model, exclude="1")
    assert int((first.weight == 0).sum()) > 0


def test_parameters_beside_each_other_in_one_memory_are_fine():
    fused = torch.randn(8, 12)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    model[0].weight, model[1].weight = nn.Parameter(fused[:, :4]), nn.Parameter(fused[:, 4:])
    report = layer_unstructured(model, eta_r=0.3)
    assert report.remaining == sum(int(mask.sum()) for mask in masks_of(model).values()) < 96


# ---- the same on disk


@pytest.mark.parametrize(
    ("name", "shape", "model_type", "kind"),
    [
        ("h.0.attn.c_attn.weight", (8, 24), "gpt2", COLUMNS),
        ("h.0.attn.c_attn.weight", (24, 8), "", ROWS),
        ("wte.weight", (50, 8), "gpt2", "a lookup table"),
        ("model.embed_tokens.weight", (50, 8), "llama", "a lookup table"),
        ("bert.embeddings.position_embeddings.weight", (50, 8), "bert", "a lookup table"),
        ("vision.patch_embedding.weight", (8, 3, 4, 4), "clip", ROWS),
        ("embed_out.weight", (50, 8), "gpt_neox", ROWS),
        ("x_embedder.weight", (8, 8), "", ROWS),
        ("grn.weight", (1, 1, 1, 8), "", "a vector"),
        ("pos_embed", (1, 5, 8), "", 'no "weight" in its name'),
        ("layers.0.mlp.experts.gate_up_proj", (4, 6, 8), "qwen3_moe", ROWS._replace(experts=4)),
        ("layers.0.mlp.experts.gate_up_proj", (4, 6, 8), "gpt_oss", COLUMNS._replace(experts=4)),
    ],
)
def test_kinds_on_disk(name, shape, model_type, kind):
    assert kind_on_disk(name, shape, model_type) == kind


def test_a_tied_table_on_disk_is_a_weight():
    assert kind_on_disk("model.embed_tokens.weight", (50, 8), "llama", tied=True) == ROWS
    assert kind_on_disk("embeddings.position_embeddings.weight", (50, 8), "x", tied=True) == "a lookup table"
