"""Averages of weights (ModelEmaV3, AveragedModel) of pruned timm models: those of dense ones, with zeros."""

import pytest
import torch
from helpers import assert_held, mask_of, masked_by_hand, masks_of, value_of, weight_names
from timm_training import SHAPE, Hand, batches, each_kind, make, momentum, plain_step, timm, twins
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from torch_sap import SAP, layer_unstructured, remove


def averages_but_copies_masks(average, value, number):
    """For use_buffers=True, with which AveragedModel averages masks too."""
    return value if value.dtype == torch.bool else average * 0.75 + value * 0.25


AVERAGES = {
    "ema": lambda model: timm.utils.ModelEmaV3(model, decay=0.75),
    "ema, one by one": lambda model: timm.utils.ModelEmaV3(model, decay=0.75, foreach=False),
    "ema, warm-up": lambda model: timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=True),
    "ema, no buffers": lambda model: timm.utils.ModelEmaV3(model, decay=0.75, exclude_buffers=True),
    "swa": AveragedModel,
    "swa, ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75)),
    "swa, buffers": lambda model: AveragedModel(model, avg_fn=averages_but_copies_masks, use_buffers=True),
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
