"""What a training script does between forward and step, on pruned timm models: bitwise as masked by hand."""

import pytest
import torch
from helpers import assert_held, mask_of, masked_by_hand, masks_of, weight_names
from timm_training import SHAPE, Hand, assert_same_training, batches, each_kind, loss_of, make, optim, timm, twins
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_sap import layer_unstructured


@each_kind
def test_gradient_accumulation(kind):
    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        losses = [loss_of(model, part) / 2 for part in inputs.chunk(2)]
        for loss in losses:
            loss.backward()
        hand.gradients()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        hand.weights()
        return torch.stack(losses).tolist(), norms

    assert_same_training(*twins(kind), step)


@each_kind
def test_clip_grad_norm_sees_masked_gradients(kind):
    seen = []

    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        everything = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        hand.gradients()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        seen.append((everything.item(), norm.item()))
        optimizer.step()
        hand.weights()
        return norm.item()

    assert_same_training(*twins(kind), step)
    for (ours, norm), (dense, _) in zip(seen[::2], seen[1::2], strict=True):
        assert ours == pytest.approx(norm, rel=1e-5)
        assert norm < 0.99 * dense, "with the gradients of pruned entries it is larger"


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_as_timm_does_it(mode):
    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        hand.gradients()
        timm.utils.dispatch_clip_grad(model.parameters(), 0.01, mode=mode)
        optimizer.step()
        hand.weights()
        return loss.item()

    assert_same_training(*twins("efficientnet"), step)


@each_kind
def test_gradient_checkpointing(kind):
    pair, calls = twins(kind), {}
    for model in pair:
        model.set_grad_checkpointing(True)
        inside = [module for name, module in model.named_modules() if name.endswith(("norm1", "bn1"))][-1]
        calls[model] = []
        inside.register_forward_pre_hook(lambda *_, of_one=calls[model]: of_one.append(1))
    assert_same_training(*pair)
    assert [len(of_one) for of_one in calls.values()] == [12, 12], "6 steps, each forward computed twice"


@each_kind
def test_a_graph_that_is_kept(kind):
    model, dense = twins(kind)
    layer_unstructured(model, eta_r=0.2)
    hand = Hand(masked_by_hand(dense, masks_of(model)), masks_of(model))
    for each in (model, dense):
        loss = loss_of(each, batches(1)[0])
        loss.backward(retain_graph=True)
        loss.backward()
    hand.gradients()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@each_kind
def test_gradient_penalty(kind):
    """torch.autograd.grad does not mask what it returns: the penalty multiplies by the masks."""
    model, dense = twins(kind)
    layer_unstructured(model, eta_r=0.2)
    masks = masks_of(model)
    hand = Hand(masked_by_hand(dense, masks), masks)
    names = [name for name, _ in dense.named_parameters()]
    penalties = []
    for each in (model, dense):
        parameters = list(each.parameters())
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            loss = loss_of(each, batches(1)[0])
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            pairs = [(masks.get(n), g) for n, g in zip(names, gradients, strict=True) if g is not None]
            penalties.append(sum((g if mask is None else g * mask).square().sum() for mask, g in pairs))
            (loss + 0.1 * penalties[-1]).backward()
    hand.gradients()
    torch.testing.assert_close(penalties[0], penalties[1])
    for name, ours, theirs in zip(names, model.parameters(), dense.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in weight_names(model):
        assert torch.count_nonzero(dict(model.named_parameters())[name + "_orig"].grad[~mask_of(model, name)]) == 0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_an_optimizer_that_needs_second_derivatives():
    """adahessian asks for products of the Hessian with the gradients that backward has left."""
    model = make("resnet")
    optimizer = optim.create_optimizer_v2(model, "adahessian", lr=0.05)
    for number in range(2):
        layer_unstructured(model, eta_r=0.2)
        for inputs in batches(2, seed=number):
            optimizer.zero_grad()
            loss_of(model, inputs).backward(create_graph=True)
            optimizer.step()
            assert_held(model)


@pytest.mark.parametrize("kind", ["resnet", "eva"])
def test_training_and_evaluation_in_turns(kind):
    """Validation inside an epoch, under inference_mode, between a forward and its backward too."""

    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        with torch.inference_mode():
            outside = model.eval()(torch.ones(SHAPE)).sum().item()
        model.train()
        loss.backward()
        hand.gradients()
        optimizer.step()
        hand.weights()
        return loss.item(), outside

    assert_same_training(*twins(kind), step)
