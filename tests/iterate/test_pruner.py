import pytest
import torch
from helpers import assert_unchanged, fit, masks_of, mlp, snapshot
from torch import nn

import torch_sap


def train(model):
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), (5, 6))
    return 0.5


def test_a_first_training_that_fails_leaves_no_trace():
    model = mlp()
    before = snapshot(model)

    def train_and_fail(model):
        train(model)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        torch_sap.iterative_sap(model, train_and_fail)
    after = {**before, "hooks": before["hooks"], "training": before["training"]}
    assert_unchanged(model, after)


def test_callback_gets_every_round_and_its_error_passes():
    seen = []
    history = torch_sap.iterative_sap(mlp(), train, iterations=2, callback=seen.append)
    assert seen == list(history)

    def stop(sap_round):
        raise StopIteration

    with pytest.raises(StopIteration):
        torch_sap.iterative_sap(mlp(), train, iterations=2, callback=stop)


@pytest.mark.parametrize("stepper", [torch_sap.SAP, torch_sap.LotteryTicket, torch_sap.OneShot])
def test_resuming_from_state_dicts_gives_the_same_masks(stepper):
    whole = mlp()
    sap = stepper(whole)
    list(torch_sap.sap_rounds(sap, train, iterations=4))

    first = mlp()
    early = stepper(first)
    next(torch_sap.sap_rounds(early, train, iterations=4))
    model_state, sap_state = first.state_dict(), early.state_dict()

    second = mlp()
    late = stepper(second)
    second.load_state_dict(model_state)
    late.load_state_dict(sap_state)
    list(torch_sap.sap_rounds(late, train, iterations=4))
    assert len(late.history) == len(sap.history) == 5
    for name, mask in masks_of(whole).items():
        torch.testing.assert_close(masks_of(second)[name], mask)
    assert [r.remaining for r in late.history][:2] == [r.remaining for r in sap.history][:2]


def test_what_a_state_dict_must_fit():
    model = mlp()
    state = torch_sap.SAP(model).state_dict()
    with pytest.raises(ValueError, match=r"p: 0\.2 here, 0\.5 in the state"):
        torch_sap.SAP(mlp(), p=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="format"):
        torch_sap.SAP(mlp()).load_state_dict({})
    with pytest.raises(ValueError, match="tensors"):
        torch_sap.SAP(nn.Sequential(nn.Linear(3, 3))).load_state_dict(state)
    torch.testing.assert_close(mlp()[0].weight, state["rewind_point"]["0.weight"])


def test_rewind_point_needs_rewinding():
    with pytest.raises(ValueError, match="rewind"):
        torch_sap.SAP(mlp(), rewind="none").set_rewind_point()


def test_an_evaluation_that_fails_after_pruning_completes_the_round():
    model = mlp()
    sap = torch_sap.SAP(model)
    start = {name: value.clone() for name, value in model.named_parameters()}
    train(model)

    def fail(model):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        sap.step(0.5, eval_fn=fail)
    assert len(sap.history) == 1
    assert not sap.history[0].pruned_metrics
    mask = model[0].weight_mask
    assert torch.equal(model[0].weight_orig[mask], start["0.weight_orig"][mask])
    assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize(("metric", "expected"), [(None, None), ("loss", None), ("speed", "metric must be one of")])
def test_figures(tmp_path, metric, expected):
    history = torch_sap.iterative_sap(mlp(), lambda model: {"loss": 1.0, "other": 2.0}, iterations=1)
    if expected:
        with pytest.raises(ValueError, match=expected):
            history.plot(tmp_path / "figure.png", metric=metric)
        assert not (tmp_path / "figure.png").exists()
    else:
        history.plot(tmp_path / "figure.png", metric=metric)
        assert (tmp_path / "figure.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="empty"):
        torch_sap.History().plot(tmp_path / "none.png")


def test_a_parameter_that_the_user_assigns_is_pruned_in_its_place():
    model = mlp()
    torch_sap.layer_unstructured(model, eta_r=0.3)
    mask = model[0].weight_mask.clone()
    model[0].weight = nn.Parameter(torch.ones(9, 6))
    model(torch.randn(4, 6))
    assert list(dict(model[0].named_parameters())) == ["weight_orig", "bias"]
    assert model[0].weight is model[0].weight_orig
    torch.testing.assert_close(model[0].weight.detach(), mask.float())


def test_sparse_gradients_are_masked():
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True))
    torch_sap.layer_unstructured(model)
    model(torch.arange(10)).sum().backward()
    gradient = model[0].weight_orig.grad
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense()[:10], model[0].weight_mask[:10].float())
