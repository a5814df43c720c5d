"""Readers of other libraries' models: the names that a library knows, and a model of each at its default size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


class Library(NamedTuple):
    """A library's reader; nothing is imported before it is asked."""

    package: str
    """Its name on the package index, whose version is recorded."""
    names: Callable[[], list[str]]
    """Every architecture that it lists."""
    build: Callable[[str], nn.Module]
    """A model of a name, with the library's defaults."""

    def made_with(self) -> str:
        """The versions that a result depends on."""
        torch_version = f"torch {torch.__version__.partition('+')[0]}"
        return torch_version if self.package == "torch" else f"{self.package} {version(self.package)}, {torch_version}"


# ---- transformers: a name is that of a configuration class


@cache
def _transformers() -> dict[str, list[tuple[Any, str]]]:
    """By the name of a configuration class the auto classes' mappings that know it, each with its model type."""
    auto = import_module("transformers.models.auto.modeling_auto")
    found: dict[str, list[tuple[Any, str]]] = {}
    for name, mapping in vars(auto).items():
        if name.endswith("_MAPPING") and hasattr(mapping, "_model_mapping"):
            for model_type, config in mapping._config_mapping.items():
                if model_type in mapping._model_mapping:
                    found.setdefault(config, []).append((mapping, model_type))
    return found


def transformers_classes(name: str) -> Iterator[tuple[Any, Any]]:
    """The configuration class, and each model class that an auto class makes from it, the plain model first."""
    for mapping, model_type in _transformers()[name]:
        config = mapping._load_attr_from_module(model_type, name)
        known = mapping._model_mapping[model_type]
        for one in known if isinstance(known, (tuple, list)) else (known,):
            yield config, mapping._load_attr_from_module(model_type, one)


def _transformers_model(name: str) -> nn.Module:
    """The first of its model classes that can be made with the configuration's defaults."""
    errors: list[Exception] = []
    for config, model in transformers_classes(name):
        try:
            built: nn.Module = model(config())
        except Exception as error:
            errors.append(error)
        else:
            return built
    raise errors[0]


# ---- torchvision, diffusers, segmentation-models-pytorch, open_clip


def _torchvision_model(name: str) -> nn.Module:
    models = import_module("torchvision.models")
    dense = {*models.list_models(models.detection), *models.list_models(models.segmentation)}
    kwargs = {"weights_backbone": None} if name in dense else {}
    model: nn.Module = models.get_model(name, weights=None, **kwargs)
    return model


def _diffusers_names() -> list[str]:
    diffusers, models = import_module("diffusers"), import_module("diffusers.models")
    names = {name for some in models._import_structure.values() for name in some}
    kinds = {name: getattr(models, name) for name in names}
    base = diffusers.ModelMixin
    return sorted(n for n, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, base) and kind != base)


def _diffusers_model(name: str) -> nn.Module:
    model: nn.Module = getattr(import_module("diffusers.models"), name)()
    return model


def _segmentation_names() -> list[str]:
    """Unet with each encoder, and each architecture with its default encoder."""
    smp = import_module("segmentation_models_pytorch")
    architectures = sorted({kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()})
    return [f"Unet({encoder})" for encoder in smp.encoders.encoders] + architectures


def _segmentation_model(name: str) -> nn.Module:
    smp = import_module("segmentation_models_pytorch")
    kind, _, encoder = name.removesuffix(")").partition("(")
    kwargs = {"encoder_name": encoder} if encoder else {}
    model: nn.Module = getattr(smp, kind)(encoder_weights=None, **kwargs)
    return model


def _open_clip_model(name: str) -> nn.Module:
    model: nn.Module = import_module("open_clip").create_model(name, device="meta")
    return model


# ---- torch_geometric and torch.nn: a class, made with the arguments that it requires


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "in_channels": lambda: 16, "out_channels": lambda: 32, "hidden_channels": lambda: 32, "channels": lambda: 16,
    "num_layers": lambda: 2, "num_relations": lambda: 4, "num_nodes": lambda: 10, "num_classes": lambda: 8,
    "K": lambda: 3, "k": lambda: 3, "alpha": lambda: 0.1, "dim": lambda: 2, "kernel_size": lambda: 3,
    "edge_dim": lambda: 8, "space_dimensions": lambda: 4, "propagate_dimensions": lambda: 8, "filter_size": lambda: 3,
    "first_aggr": lambda: True, "aggregators": lambda: ["mean", "max"], "scalers": lambda: ["identity"],
    "deg": lambda: torch.ones(4, device="cpu", dtype=torch.long), "num_node_types": lambda: 3,
    "num_edge_types": lambda: 4, "edge_type_emb_dim": lambda: 5, "edge_attr_emb_dim": lambda: 5,
    "metadata": lambda: (["a", "b"], [("a", "to", "b"), ("b", "to", "a")]), "embedding_dim": lambda: 16,
    "nn": lambda: nn.Linear(16, 16), "conv": lambda: nn.Linear(16, 16), "num_rels": lambda: 4, "seq_len": lambda: 3,
    "depth": lambda: 2, "num_blocks": lambda: 2, "num_bilinear": lambda: 4, "num_spherical": lambda: 3,
    "num_radial": lambda: 3, "int_emb_size": lambda: 8, "basis_emb_size": lambda: 4, "out_emb_channels": lambda: 8,
    "num_timesteps": lambda: 2, "hidden_node_channels": lambda: 16, "hidden_edge_channels": lambda: 16,
    "dim_emb": lambda: 32, "dim_pe_in": lambda: 20, "dim_pe_out": lambda: 8, "mlp_h": lambda: nn.Linear(16, 3),
    "mlp_f": lambda: nn.Linear(19, 16), "mlp_g": lambda: nn.Linear(16, 16),
    "in_features": lambda: 16, "out_features": lambda: 32, "in1_features": lambda: 16, "in2_features": lambda: 8,
    "input_size": lambda: 16, "hidden_size": lambda: 32, "num_embeddings": lambda: 20, "embed_dim": lambda: 32,
    "num_heads": lambda: 4, "d_model": lambda: 32, "nhead": lambda: 4, "normalized_shape": lambda: 16,
    "num_features": lambda: 16, "num_channels": lambda: 16, "num_groups": lambda: 4, "n_classes": lambda: 60,
    "cutoffs": lambda: [10, 30], "encoder_layer": lambda: nn.TransformerEncoderLayer(32, 4),
    "decoder_layer": lambda: nn.TransformerDecoderLayer(32, 4), "num_types": lambda: 3,
}  # fmt: skip
"""By the name of a required argument a value; those of modules are made anew."""


def _made(kind: Any) -> nn.Module:
    """A module of a class, with values for the arguments that it requires."""
    if issubclass(kind, nn.RNNBase):
        kind = partial(kind, 16, 32)
    required = [
        name
        for name, parameter in signature(kind).parameters.items()
        if parameter.default is Parameter.empty and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
    ]
    if unknown := [name for name in required if name not in ARGUMENTS]:
        raise NotImplementedError(f"no value for {', '.join(unknown)}")
    model: nn.Module = kind(*(ARGUMENTS[name]() for name in required))
    return model


def _geometric_names() -> list[str]:
    geometric = import_module("torch_geometric.nn")
    names = {*geometric.conv.classes, *geometric.models.classes, "HeteroLinear", "HeteroDictLinear"}
    return sorted(name for name in names if isinstance(getattr(geometric, name), type))


def _torch_names() -> list[str]:
    """The modules of torch.nn that have parameters of their own or in parts that they make."""
    names = []
    for name, kind in vars(nn).items():
        known = isinstance(kind, type) and issubclass(kind, nn.Module) and not issubclass(kind, LazyModuleMixin)
        if known and name != "Container":
            with suppress(NotImplementedError, TypeError, ValueError), torch.device("meta"):
                if any(True for _ in _made(kind).parameters()):
                    names.append(name)
    return sorted(names)


LIBRARIES = {
    "torch": Library("torch", _torch_names, lambda name: _made(getattr(nn, name))),
    "torchvision": Library(
        "torchvision", lambda: import_module("torchvision.models").list_models(), _torchvision_model
    ),
    "transformers": Library("transformers", lambda: sorted(_transformers()), _transformers_model),
    "diffusers": Library("diffusers", _diffusers_names, _diffusers_model),
    "torch_geometric": Library(
        "torch_geometric", _geometric_names, lambda name: _made(getattr(import_module("torch_geometric.nn"), name))
    ),
    "segmentation_models_pytorch": Library("segmentation_models_pytorch", _segmentation_names, _segmentation_model),
    "open_clip": Library("open_clip_torch", lambda: import_module("open_clip").list_models(), _open_clip_model),
}
