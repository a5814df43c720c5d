"""Scores from activations and gradients, against what the definition says, in modules and operations of many kinds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import FUNCTIONS, SCOPES, assert_unchanged, convnet, import_transformers, mlp, snapshot
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_sap import SAP, global_unstructured, iterative_sap, layer_unstructured, scores
from torch_sap.decide.sums import power_sums
from torch_sap.masks.parameters import entries_of

each_scope = pytest.mark.parametrize("scope", SCOPES)


def by_definition(module, name, batches):
    """The norms from derivatives: the weight's entries meet x where y changes with them; x is squared by hand."""
    weight = getattr(module, name)
    ones = torch.zeros_like(weight, requires_grad=True)
    total = sum(
        torch.func.functional_call(module, {name: ones, "bias": torch.zeros_like(module.bias)}, (x.square(),)).sum()
        for x in batches
    )
    (squares,) = torch.autograd.grad(total, ones)
    return (weight * squares.sqrt()).abs()


def test_inference_mode_makes_no_difference():
    model, x = mlp(), torch.randn(8, 6)
    for score in (scores.activations([x]), scores.gradients([x], lambda model, batch: model(batch).square().mean())):
        expected = score(model)
        with torch.inference_mode():
            found = score(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[pair], expected[pair]) for pair in expected)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 6)),
        (lambda: nn.Linear(6, 4), (2, 3, 6)),
        (lambda: nn.Linear(6, 4), (6,)),
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
        (lambda: nn.Conv2d(3, 5, 3, dilation=2), (2, 3, 8, 8)),
        (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 4, 3, groups=4).to(memory_format=torch.channels_last), (2, 4, 6, 6)),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_activations_by_definition(make, shape, pruned):
    torch.manual_seed(0)
    module, batches = make(), [torch.randn(shape), torch.randn(shape)]
    expected = by_definition(module, "weight", batches)
    model = nn.Sequential(module)
    if pruned:
        layer_unstructured(model, eta_r=0.5)
        expected = expected * module.weight_mask
    found = scores.activations(batches)(model)
    torch.testing.assert_close(found[module, "weight"], expected.detach())


def test_activations_of_attention_and_recurrence():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    found = scores.activations([(x, x, x)])(attention.eval())
    norms = x.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found[attention, "in_proj_weight"], (attention.in_proj_weight * norms).abs().detach())
    lstm = nn.LSTM(6, 4, batch_first=True)
    x = torch.randn(2, 5, 6)
    found = scores.activations([x])(lstm)
    norms = x.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found[lstm, "weight_ih_l0"], (lstm.weight_ih_l0 * norms).abs().detach())
    assert found[lstm, "weight_hh_l0"].shape == (16, 4)


def test_activations_of_experts_and_of_weights_in_pieces():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_weight = nn.Parameter(torch.randn(3, 4, 6))
            self.fused_weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            y = torch.stack([F.linear(x[number::3], self.up_weight[number]) for number in range(3)])
            first, second = self.fused_weight.chunk(2)
            return y.sum(), F.linear(x, first) + x @ second.t() * 2

    model, x = Experts(), torch.randn(9, 6)
    found = scores.activations([x])(model)
    norms = torch.stack([x[number::3].norm(dim=0) for number in range(3)])
    torch.testing.assert_close(found[model, "up_weight"], (model.up_weight * norms[:, None]).abs().detach())
    torch.testing.assert_close(found[model, "fused_weight"], (model.fused_weight * x.norm(dim=0)).abs().detach())


def test_activations_under_autocast_and_in_half_precision():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(5, 6)
    expected = scores.activations([x])(model)

    def cast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return scores.activations([x])(model)

    for found in (cast(model), scores.activations([x.bfloat16()])(copy.deepcopy(model).bfloat16())):
        for one, other in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


def test_a_shared_weight_adds_up_what_it_meets():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    found = scores.activations([x])(model)
    norms = (x.square().sum(0) + model[:2](x).square().sum(0)).sqrt()
    assert set(found) == {(model[0], "weight"), (model[2], "weight")}
    torch.testing.assert_close(found[model[0], "weight"], (model[0].weight * norms).abs().detach())


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_by_definition(frozen):
    torch.manual_seed(0)
    model = mlp()
    batches = [(torch.randn(7, 6), torch.randint(4, (7,))) for _ in range(2)]
    sum(cross_entropy(model.eval(), batch) for batch in batches).backward()
    expected = {(m, "weight"): (m.weight * m.weight.grad).abs().detach() for m in model if isinstance(m, nn.Linear)}
    model.zero_grad()
    model[0].weight.requires_grad_(not frozen)
    found = scores.gradients(batches, cross_entropy)(model)
    for pair, tensor in found.items():
        torch.testing.assert_close(tensor, expected[pair])
    assert model[0].weight.requires_grad is not frozen
    assert all(parameter.grad is None for parameter in model.parameters())


@each_scope
@pytest.mark.parametrize("kind", ["activations", "gradients"])
def test_the_functions_take_a_score_and_leave_the_model_as_it_was(scope, kind):
    torch.manual_seed(0)
    model, x = convnet(), torch.randn(6, 2, 6, 6)
    score = {
        "activations": scores.activations([x]),
        "gradients": scores.gradients([(x, torch.randint(4, (6,)))], cross_entropy),
    }[kind]
    before = snapshot(model)
    mapping = score(model)
    other = copy.deepcopy(model)
    assert snapshot(model).keys() == before.keys()
    assert model.training
    report = FUNCTIONS[scope](model, importance_scores=score)
    assert report.pruned > 0
    paths = {module: path for path, module in model.named_modules()}
    of_other = {(other.get_submodule(paths[m]), name): tensor for (m, name), tensor in mapping.items()}
    again = FUNCTIONS[scope](other, importance_scores=of_other)
    assert again.remaining == report.remaining
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_errors():
    model, x = mlp(), torch.randn(3, 6)
    unused = nn.ModuleDict({"used": nn.Linear(6, 6), "unused": nn.Linear(6, 6)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(
        ValueError, match=r"must see every weight in a matrix product or a convolution, but not unused\.weight"
    ):
        scores.activations([x])(unused)
    with pytest.raises(ValueError, match=r"must find every weight in the loss, but not unused\.weight"):
        scores.gradients([x], lambda model, x: model.forward(x).sum())(unused)
    for score in (scores.activations([]), scores.gradients([], cross_entropy)):
        with pytest.raises(ValueError, match="batches must hold at least one batch"):
            score(model)
    with pytest.raises(TypeError, match="loss_fn must return a tensor of one entry"):
        scores.gradients([x], lambda model, x: model(x))(model)
    with pytest.raises(
        TypeError, match=r"importance_scores must be a dict from .* or a callable that returns one, got int"
    ):
        global_unstructured(model, importance_scores=3)
    with pytest.raises(ValueError, match=r"importance_scores must be finite, but 0\.weight"):
        global_unstructured(model, importance_scores=scores.activations([x * torch.nan]))


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_activations_of_a_mixture_of_experts(way):
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = transformers.MixtralConfig(vocab_size=32, num_local_experts=4, **sizes)
    model = transformers.MixtralForCausalLM(config)
    found = {}
    for kind in ("eager", way):
        model.set_experts_implementation(kind)
        batch = {"input_ids": torch.arange(24).view(2, 12)}
        if kind == "batched_mm":
            with pytest.raises(
                ValueError, match=r"must see every weight .*\.experts\.gate_up_proj"
            ):  # it copies single experts
                scores.activations([batch])(model)
            return
        found[kind] = list(scores.activations([batch])(model).values())
    for one, other in zip(found["eager"], found[way], strict=True):
        torch.testing.assert_close(one, other)


# ---- in iterative pruning


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@each_scope
def test_a_pruner_asks_before_each_pruning(scope):
    asked, x = [], torch.randn(8, 6, generator=torch.Generator().manual_seed(9))

    def score(model):
        asked.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
        return scores.activations([x])(model)

    model, by_hand = mlp(), mlp()
    sap = SAP(model, scope=scope, importance_scores=score, rewind="none")
    for _ in range(2):
        train(model)
        found = sap.step()
        train(by_hand)
        FUNCTIONS[scope](by_hand, importance_scores=scores.activations([x]))
        for one, two in zip(model.buffers(), by_hand.buffers(), strict=True):
            assert torch.equal(one, two)
    assert len(asked) == 2
    assert asked[0] < asked[1], "it sees the pruned model"
    sap.record()
    assert len(asked) == 2
    weights = power_sums(entries_of(sap.prunables), 0.5, 1.0).index("global")["global"]
    assert sap.history[-1].retrained.pqi["global"]["global"] == weights, "the record is of the weights"
    assert found.groups.keys() == sap.history[-1].groups.keys()


@each_scope
def test_a_resumed_run_asks_again_and_stores_no_scores(scope, tmp_path):
    x, asked = torch.randn(8, 6, generator=torch.Generator().manual_seed(9)), []

    def score(model):
        asked.append(scores.activations([x])(model))
        return asked[-1]

    def run(path, iterations, score):
        model = mlp()
        iterative_sap(model, train, iterations=iterations, checkpoint=path, importance_scores=score, scope=scope)
        return model

    whole = run(tmp_path / "a", 3, score)
    assert len(asked) == 3
    run(tmp_path / "b", 1, score)
    resumed = run(tmp_path / "b", 3, score)
    assert len(asked) == 3 + 1 + 2
    for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    other = run(tmp_path / "c", 3, None)
    assert any(not torch.equal(one, two) for one, two in zip(whole.buffers(), other.buffers(), strict=True))
    stored = tree_leaves(torch.load(tmp_path / "b", weights_only=False))
    found = [tensor for mapping in asked for tensor in mapping.values()]
    for tensor in stored:
        assert not any(torch.is_tensor(tensor) and torch.equal(tensor, one) for one in found)


def test_the_state_of_a_pruner_holds_no_scores():
    x = torch.randn(8, 6)
    states = []
    for score in (scores.activations([x]), None):
        sap = SAP(mlp(), importance_scores=score)
        sap.step()
        states.append(sap.state_dict())
    assert states[0].keys() == states[1].keys()


@each_scope
def test_a_pruner_refuses_scores_that_do_not_fit(scope):
    model = mlp()
    with pytest.raises(ValueError, match=r"importance_scores of 0\.weight must have the parameter's shape"):
        SAP(model, importance_scores={(model[0], "weight"): torch.ones(2, 2)})
    assert not hasattr(model[0], "weight_mask")
    given = {(model[0], "weight"): torch.ones(9, 6), (model[3], "weight"): torch.ones(4, 9)}
    asked = {
        r"importance_scores must be finite, but 0\.weight": {(model[0], "weight"): torch.full((9, 6), torch.nan)},
        r"importance_scores of 3\.weight must have the parameter's shape": {(model[3], "weight"): torch.ones(9, 4)},
        r"must belong to parameters that are pruned": {(model[0], "bias"): torch.ones(9)},
    }
    for message, changed in asked.items():
        sap = SAP(model, scope=scope, importance_scores=lambda model, changed=changed: {**given, **changed})
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            sap.step()
        assert_unchanged(model, before)
    sap = SAP(model, scope=scope, importance_scores=lambda model: {(model[0], "weight"): torch.ones(9, 6)})
    missing = (
        r"importance_scores must return a tensor for each parameter that is pruned, but none for 3\.weight; add it"
    )
    for call in (sap.step, lambda: FUNCTIONS[scope](model, importance_scores=sap.importance_scores)):
        with pytest.raises(ValueError, match=missing):
            call()
        assert_unchanged(model, before)
