"""timm models that read their weights without calling the module, and timm's moving average, on a pruned model."""

import copy
import warnings

import pytest
import torch
from helpers import assert_held, convnet, fit, mask_of, masked_by_hand, masks_of, value_of, weight_names

from torch_sap import layer_unstructured, neuron_unstructured, remove

timm = pytest.importorskip("timm")
SMALL = {"img_size": 16, "num_classes": 5, "in_chans": 1}
MODELS = {
    "eva": lambda: timm.models.eva.Eva(
        **SMALL, patch_size=4, embed_dim=16, depth=2, num_heads=2, swiglu_mlp=True, use_rot_pos_emb=True
    ),
    "beit": lambda: timm.models.beit.Beit(
        **SMALL, patch_size=4, embed_dim=16, depth=2, num_heads=2, use_rel_pos_bias=True, init_values=0.1
    ),
    "swin v2": lambda: timm.models.swin_transformer_v2.SwinTransformerV2(
        **SMALL, patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4, drop_path_rate=0.0
    ),
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5, in_chans=1),
}
SHAPE = (2, 1, 16, 16)


def twins(kind):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = MODELS[kind]()
    return model, copy.deepcopy(model)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prune", [layer_unstructured, neuron_unstructured])
def test_trains_like_a_model_masked_by_hand(kind, prune):
    model, dense = twins(kind)
    optimizers = [adamw(model), adamw(dense)]
    assert fit(model, optimizers[0], SHAPE, steps=1) == fit(dense, optimizers[1], SHAPE, steps=1)
    for seed in (1, 2):
        prune(model, eta_r=0.1)
        masks = masks_of(model)
        masked_by_hand(dense, masks)
        ours, theirs = (
            fit(model, optimizers[0], SHAPE, 3, seed=seed),
            fit(dense, optimizers[1], SHAPE, 3, masks, seed=seed),
        )
        assert ours == theirs
        assert_held(model)
    assert all(torch.equal(value_of(model, name), value_of(dense, name)) for name in weight_names(dense))


@pytest.mark.parametrize("kind", MODELS)
def test_remove_gives_a_timm_model_with_its_own_keys(kind):
    model, dense = twins(kind)
    layer_unstructured(model, eta_r=0.3)
    fit(model, adamw(model), SHAPE, steps=2)
    inputs = torch.randn(SHAPE)
    output = model.eval()(inputs)
    remove(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense.eval()(inputs), output)


@pytest.mark.parametrize("make", [convnet, lambda: twins("eva")[0]])
def test_moving_average_of_a_pruned_model(make):
    model = make()
    shape = (2, 2, 6, 6) if make is convnet else SHAPE
    layer_unstructured(model, eta_r=0.3)
    optimizer = adamw(model)
    fit(model, optimizer, shape)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    for seed in range(3):
        fit(model, optimizer, shape, steps=1, seed=seed)
        average.update(model)
        assert_held(model)
        assert_held(average.module)
    layer_unstructured(model, eta_r=0.3)
    for _ in range(2):
        average.update(model)
    output = average(torch.randn(shape))
    assert output.isfinite().all()
    for name in weight_names(model):
        assert torch.equal(mask_of(average.module, name), mask_of(model, name)), "masks are copied, not blended"
        assert average.module.get_submodule(name.rpartition(".")[0]) is not None
    assert_held(average.module)


def test_moving_average_equals_the_average_of_masked_weights():
    model = convnet()
    layer_unstructured(model, eta_r=0.3)
    average, optimizer = timm.utils.ModelEmaV3(model, decay=0.75), adamw(model)
    expected = {name: value_of(model, name).clone() for name in weight_names(model)}
    for seed in range(3):
        fit(model, optimizer, (2, 2, 6, 6), steps=1, seed=seed)
        average.update(model)
        for name, value in expected.items():
            value.lerp_(value_of(model, name), 0.25)
    for name, value in expected.items():
        torch.testing.assert_close(value_of(average.module, name), value)
