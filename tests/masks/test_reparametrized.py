"""Modules that compute their weight from other parameters are named when a model is pruned."""

import warnings

import pytest
import torch
from helpers import FUNCTIONS, SCOPES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import torch_sap


def model_with(changed):
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(changed))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "change", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_parametrized_modules_are_named_and_stay_dense(scope, change):
    model = model_with(change(nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match=r"it is not pruned: 1.0. Call parametrize.remove_parametrizations") as warned:
        FUNCTIONS[scope](model, gamma=3.0)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert [weight.name for weight in torch_sap.verify(model, torch.randn(2, 4)).weights] == ["0.weight"]


def test_a_stepper_names_them_too():
    model = model_with(parametrizations.spectral_norm(nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match=r"not pruned: 1.0\."):
        torch_sap.SAP(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm_is_named():
    model = model_with(weight_norm(nn.Linear(4, 4)))
    with pytest.warns(
        UserWarning, match=r"weight_v is pruned by its own magnitudes: 1.0. Call torch.nn.utils.remove_weight_norm"
    ):
        torch_sap.layer_unstructured(model)


def test_what_the_warnings_say_to_do_works():
    model = model_with(parametrizations.spectral_norm(nn.Linear(4, 4)))
    parametrize.remove_parametrizations(model[1][0], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_sap.layer_unstructured(model)
    assert len(torch_sap.verify(model, torch.randn(2, 4)).weights) == 2


def test_the_model_is_unchanged_if_the_warning_is_an_error():
    model = model_with(parametrizations.spectral_norm(nn.Linear(4, 4)))
    keys = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not pruned"):
            torch_sap.layer_unstructured(model)
    assert list(model.state_dict()) == keys


def test_paths_are_those_inside_data_parallel(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs the package torch with gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model_with(parametrizations.spectral_norm(nn.Linear(4, 4))))
        with pytest.warns(UserWarning, match=r"not pruned: 1.0\."):
            torch_sap.layer_unstructured(parallel)
    finally:
        torch.distributed.destroy_process_group()


def test_other_parametrized_tensors_are_no_matter():
    class Positive(nn.Module):
        def forward(self, x):
            return x.abs()

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", Positive())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_sap.layer_unstructured(model_with(layer))
