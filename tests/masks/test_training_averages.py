"""Averages of weights (ModelEmaV3, AveragedModel) of pruned timm models: those of dense ones, with zeros."""

import copy

import pytest
import torch
from helpers import assert_held, mask_of, masked_by_hand, masks_of, value_of, weight_names
from timm_training import SHAPE, Hand, batches, each_kind, make, momentum, plain_step, timm, twins
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from torch_sap import SAP, layer_unstructured, remove


def averages_but_copies_masks(average, value, number):
    """What a user may write for use_buffers=True, with which AveragedModel averages masks too."""
    return value if value.dtype == torch.bool else average * 0.75 + value * 0.25


class ExponentialMovingAverage(AveragedModel):
    """That of torchvision's reference scripts."""

    def __init__(self, model, decay=0.75):
        super().__init__(model, "cpu", lambda mean, value, number: decay * mean + (1 - decay) * value, use_buffers=True)


AVERAGED_MODELS = {
    "swa": AveragedModel,
    "swa, ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75)),
    "swa, buffers": lambda model: AveragedModel(model, use_buffers=True),
    "swa, ema, buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True),
    "swa, ema of floats, buffers": lambda model: AveragedModel(
        model, avg_fn=averages_but_copies_masks, use_buffers=True
    ),
    "torchvision": ExponentialMovingAverage,
}
AVERAGES = {
    "ema": lambda model: timm.utils.ModelEmaV3(model, decay=0.75),
    "ema, one by one": lambda model: timm.utils.ModelEmaV3(model, decay=0.75, foreach=False),
    "ema, warm-up": lambda model: timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=True),
    "ema, no buffers": lambda model: timm.utils.ModelEmaV3(model, decay=0.75, exclude_buffers=True),
    **AVERAGED_MODELS,
}
each_average = pytest.mark.parametrize("make_average", AVERAGES.values(), ids=AVERAGES)


def update(average, model):
    getattr(average, "update_parameters" if isinstance(average, AveragedModel) else "update")(model)


def train(model, average, hand, optimizer, seed):
    for inputs in batches(2, seed=seed):
        plain_step(model, optimizer, inputs, hand)
        update(average, model)


def assert_average(average, model, dense_average):
    """Bool masks of the model, and the average of the dense model with zeros where they say so; all the rest equal."""
    masks = masks_of(model)
    assert list(average.module.state_dict()) == list(model.state_dict())
    for name, mask in masks.items():
        assert dict(average.module.named_buffers())[name + "_mask"].dtype == torch.bool
        assert torch.equal(mask_of(average.module, name), mask), name
    average(torch.ones(SHAPE))
    assert_held(average.module)
    for name, value in dense_average.module.named_parameters():
        expected = value.masked_fill(~masks[name], 0) if name in masks else value
        assert torch.equal(value_of(average.module, name), expected), name


@each_average
@each_kind
@pytest.mark.parametrize("made", ["before", "after"])
def test_rounds_of_pruning_between_updates(kind, make_average, made):
    """The average of a dense model that is masked by hand, updated at the same moments, is the reference."""
    model, dense = twins(kind)
    averages = [make_average(each) for each in (model, dense)] if made == "before" else []
    if averages:
        layer_unstructured(averages[0].module, gamma=0)  # what the user writes: the form, and nothing pruned
    optimizers = [momentum(each) for each in (model, dense)]
    for number in range(3):
        layer_unstructured(model, eta_r=0.2)
        masks = masks_of(model)
        masked_by_hand(dense, masks)
        averages = averages or [make_average(each) for each in (model, dense)]
        train(model, averages[0], Hand(model), optimizers[0], number)
        train(dense, averages[1], Hand(dense, masks), optimizers[1], number)
        for average in averages:
            average.eval()
        averages[1](torch.ones(SHAPE))
        assert_average(averages[0], model, averages[1])
    buffers = dict(averages[0].module.named_buffers())
    for name, value in averages[1].module.named_buffers():
        assert torch.equal(buffers[name], value), name


@each_average
def test_an_average_through_the_rounds_of_sap(make_average):
    """Made once, after SAP(model); rewinding goes into it as any other update does."""
    model = make("resnet")
    sap = SAP(model, eta_r=0.2)
    average, optimizer = make_average(model), momentum(model)
    for number in range(3):
        train(model, average, Hand(model), optimizer, number)
        sap.step()
        update(average, model)
        assert_average(average, model, average)
    outputs = average.module.eval()(torch.ones(SHAPE))
    state = remove(average.module).state_dict()
    zeros = sum(int((state[name] == 0).sum()) for name in weight_names(average.module))
    assert zeros == sum(int((~mask).sum()) for mask in masks_of(model).values()) > 0
    fresh = make("resnet").eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(torch.ones(SHAPE)), outputs)


@each_average
def test_right_after_an_update_loading_and_remove_give_zeros(make_average):
    """Between an update and the next forward an average remembers weights from before the latest pruning."""
    model = make("vit")
    layer_unstructured(model)
    average = make_average(model)
    train(model, average, Hand(model), momentum(model), 0)
    layer_unstructured(model, eta_r=0.5)
    update(average, model)
    loaded = make("vit")
    layer_unstructured(loaded, gamma=0)
    loaded.load_state_dict(average.module.state_dict())
    masks = masks_of(model)
    assert all(torch.equal(mask, masks_of(loaded)[name]) for name, mask in masks.items())
    assert_held(loaded)
    state = average.module.state_dict()
    assert any(torch.count_nonzero(state[name + "_orig"][~mask]) for name, mask in masks.items())
    state = remove(average.module).state_dict()
    assert not any(torch.count_nonzero(state[name][~mask]) for name, mask in masks.items())


def test_update_bn_of_an_average():
    model = make("resnet")
    layer_unstructured(model, eta_r=0.2)
    average = AveragedModel(model)
    train(model, average, Hand(model), momentum(model), 0)
    layer_unstructured(model, eta_r=0.2)
    update(average, model)
    update_bn(batches(2), average)
    assert_held(average.module)
    dense = make("resnet")
    dense.load_state_dict({n: v for n, v in remove(average.module).state_dict().items() if "running" not in n}, False)
    update_bn(batches(2), dense)
    for name, value in dense.named_buffers():
        assert torch.equal(dict(average.module.named_buffers())[name], value), name


@pytest.mark.parametrize("make_average", AVERAGED_MODELS.values(), ids=AVERAGED_MODELS)
@each_kind
def test_an_average_from_before_any_pruning_gets_masks(kind, make_average):
    """Without the line that other averages need."""
    model, dense = twins(kind)
    averages = [make_average(each) for each in (model, dense)]
    optimizers = [momentum(each) for each in (model, dense)]
    for number in range(3):
        masks = masks_of(model)
        train(model, averages[0], Hand(model), optimizers[0], number)
        train(dense, averages[1], Hand(dense, masks), optimizers[1], number)
        if number:
            for average in averages:
                average.eval()
            averages[1](torch.ones(SHAPE))
            assert_average(averages[0], model, averages[1])
        layer_unstructured(model, eta_r=0.2)
        masked_by_hand(dense, masks_of(model))
        for each in (model, dense):
            each.train()


def test_an_update_that_fails_leaves_the_masks():
    def fails(mean, value, number):
        raise OSError("no")

    model = make("resnet")
    layer_unstructured(model)
    average = AveragedModel(model, avg_fn=fails, use_buffers=True)
    update(average, model)
    keys = list(model.state_dict())
    with pytest.raises(OSError, match="no"):
        update(average, model)
    assert list(model.state_dict()) == list(average.module.state_dict()) == keys
    for each in (model, average.module):
        assert_held(each)


class SkipsMasks:
    """An average of what is a float (Ultralytics)."""

    def __init__(self, model):
        self.module = copy.deepcopy(model).eval()

    def update(self, model):
        state = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.75).add_(state[name].detach(), alpha=0.25)


class Momentum(SkipsMasks):
    """A momentum encoder, as of MoCo."""

    @torch.no_grad()
    def update(self, model):
        for mean, value in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.mul_(0.75).add_(value, alpha=0.25)


OTHERS = {"ema v2": lambda model: timm.utils.ModelEmaV2(model, decay=0.75), "floats": SkipsMasks, "momentum": Momentum}


@pytest.mark.parametrize("make_average", OTHERS.values(), ids=OTHERS)
def test_another_average_warns_when_it_is_used_with_old_masks(make_average):
    model = make("vit")
    sap = SAP(model, eta_r=0.2)
    average, optimizer = make_average(model), momentum(model)
    for number in range(2):
        train(model, average, Hand(model), optimizer, number)
        average.module(torch.ones(SHAPE))  # no warning: the masks are those of the model
    sap.step()
    average.module(torch.ones(SHAPE))  # nor here: it is the average of the model before the step
    train(model, average, Hand(model), optimizer, 2)
    with pytest.warns(UserWarning, match=r"If it is an average .* after each update add average\.load_state_dict\("):
        average.module(torch.ones(SHAPE))
    average.module(torch.ones(SHAPE))  # once is enough
    average = average.module
    average.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("_mask")}, strict=False)
    assert all(torch.equal(mask_of(average, name), mask) for name, mask in masks_of(model).items())
    average(torch.ones(SHAPE))
    assert_held(average)


@pytest.mark.parametrize("pruned", ["everything", "the last layer", "everything, twice"])
@pytest.mark.parametrize("make_average", OTHERS.values(), ids=OTHERS)
def test_another_average_warns_when_it_is_first_used_at_the_end(make_average, pruned):
    model = make("vit")
    layer_unstructured(model, eta_r=0.2)
    average, optimizer = make_average(model), momentum(model)
    train(model, average, Hand(model), optimizer, 0)
    if pruned == "the last layer":
        layer_unstructured([(model.head, "weight")], eta_r=0.2)
    else:
        layer_unstructured(model, eta_r=0.2)
    train(model, average, Hand(model), optimizer, 1)
    if pruned == "everything, twice":
        layer_unstructured(model, eta_r=0.2)
        train(model, average, Hand(model), optimizer, 2)
    with pytest.warns(UserWarning, match="If it is an average"):
        average.module(torch.ones(SHAPE))


@pytest.mark.parametrize("use", ["kept", "trained", "fine-tuned", "loaded", "pruned", "converted", "called"])
def test_a_copy_that_is_no_average_does_not_warn(use):
    model = make("vit")
    layer_unstructured(model, eta_r=0.2)
    copied = copy.deepcopy(model)
    masks = masks_of(copied)
    for number in range(3):
        if use in ("trained", "fine-tuned"):
            copied.requires_grad_(use == "trained")
            copied.head.requires_grad_(True)
            plain_step(copied, momentum(copied), batches(1)[0], Hand(copied))
        elif use == "loaded" and number == 0:
            copied.load_state_dict(model.state_dict())
        elif use == "pruned" and number == 0:
            layer_unstructured(copied, eta_r=0.1)
            masks = masks_of(copied)
        layer_unstructured(model, eta_r=0.2)
        if use == "converted":
            copied.double() if number == 1 else copied.float()
        inputs = torch.ones(SHAPE, dtype=next(copied.parameters()).dtype)
        if use == "called":
            functional_call(copied, {name: value.detach() * 2 for name, value in copied.named_parameters()}, inputs)
        copied(inputs)
        assert all(torch.equal(mask_of(copied, name), mask) for name, mask in masks.items())


def test_an_average_swapped_in_by_data_is_pruned():
    """As apply_shadow and restore of many scripts."""
    model = make("vit").eval()
    layer_unstructured(model, eta_r=0.2)
    shadow = {name: parameter.data + 0.1 for name, parameter in model.named_parameters()}
    layer_unstructured(model, eta_r=0.2)
    backup = {name: parameter.data for name, parameter in model.named_parameters()}
    expected = model(torch.ones(SHAPE))
    for name, parameter in model.named_parameters():
        parameter.data = shadow[name]
    output = model(torch.ones(SHAPE))
    assert_held(model)
    assert not torch.equal(output, expected)
    for name, parameter in model.named_parameters():
        parameter.data = backup[name]
    assert torch.equal(model(torch.ones(SHAPE)), expected)
    assert_held(model)
