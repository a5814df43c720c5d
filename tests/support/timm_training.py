"""Small timm models, and training of a pruned one beside a dense one that is masked by hand."""

import copy
import warnings

import pytest
import torch
from helpers import assert_held, masked_by_hand, masks_of, value_of

import torch_sap

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")
scheduler = pytest.importorskip("timm.scheduler")

SHAPE = (4, 3, 32, 32)
MODELS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=32),
    "eva": lambda: timm.models.eva.Eva(  # reads qkv.weight without calling qkv
        img_size=32,
        patch_size=8,
        num_classes=5,
        embed_dim=16,
        depth=2,
        num_heads=2,
        swiglu_mlp=True,
        use_rot_pos_emb=True,
    ),
}
each_kind = pytest.mark.parametrize("kind", MODELS)
each_kind_some_slow = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("resnet", "eva") else pytest.mark.slow) for kind in MODELS]
)
convolutional = pytest.mark.parametrize("kind", ["resnet", "efficientnet"])


def make(kind):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's own, in old versions
        return MODELS[kind]()


def twins(kind):
    model = make(kind)
    return model, copy.deepcopy(model)


def batches(number, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(number)]


def loss_of(model, inputs):
    return (model(inputs).float() - 1).square().mean()


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class Hand:
    """Masking by hand of a dense model; without masks it does nothing."""

    def __init__(self, model, masks=None):
        masks = masks or {}
        self.masked = [(p, masks[name]) for name, p in model.named_parameters() if name in masks]
        assert len(self.masked) == len(masks)

    def gradients(self):
        for parameter, mask in self.masked:
            parameter.grad.masked_fill_(~mask, 0)  # an overflow there too

    def weights(self):
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)


def plain_step(model, optimizer, inputs, hand):
    """One training step. The gradients are there to be looked at until the next one."""
    optimizer.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    hand.gradients()
    optimizer.step()
    hand.weights()
    return loss.item()


def assert_same_training(model, dense, step=plain_step, optimizer=momentum, *, wrap=lambda model: model, rounds=2):
    """Prune a model and train it, round by round, and do the same by hand with its dense twin: bitwise equal.

    Args:
        model: A timm model, pruned or not.
        dense: Its twin, never pruned.
        step: Called as step(model, optimizer, inputs, hand) for each batch; returns a number to compare.
        optimizer: Makes the optimizer, before the first pruning.
        wrap: What the training script makes of a model.
        rounds: Prunings.
    """
    optimizers = [optimizer(each) for each in (model, dense)]
    trained = [wrap(each) for each in (model, dense)]
    for number in range(rounds):
        torch_sap.layer_unstructured(model, eta_r=0.2)
        assert_held(model)
        masks = masks_of(model)
        hands = [Hand(model), Hand(masked_by_hand(dense, masks), masks)]
        for inputs in batches(3, seed=number):
            both = zip(trained, optimizers, hands, strict=True)
            found, expected = (step(each, its, inputs, hand) for each, its, hand in both)
            assert found == expected
            assert_held(model)
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items()), "training changed masks"
    assert_same_values(model, dense)


def assert_same_values(model, dense):
    """Parameters and buffers of a pruned model are those of a dense one."""
    for name, value in dense.named_parameters():
        assert torch.equal(value_of(model, name), value), name
    buffers = dict(model.named_buffers())
    for name, value in dense.named_buffers():
        assert torch.equal(buffers[name], value), name
