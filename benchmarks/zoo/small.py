"""Small models of other libraries with random values, and inputs that they compute with, for a real run."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from zoo.libraries import LIBRARIES
from zoo.tiny import tiny_model, workable


class Trial(NamedTuple):
    """A dense model, an example for it, and how it is written and read."""

    model: nn.Module
    example: tuple[Any, ...] | dict[str, Any]
    saved: Callable[[nn.Module], nn.Module] | None = None

    def call(self, model: nn.Module) -> Any:
        """What a model of this kind computes of the example."""
        return model(**self.example) if isinstance(self.example, dict) else model(*self.example)


def save_and_load(model: nn.Module) -> nn.Module:
    """Write a pruned model with its library's save_pretrained, and make a new one of the folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded: nn.Module = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
    return loaded


def _transformers(name: str) -> Trial:
    model = tiny_model(name)
    return Trial(model, workable(model), save_and_load)


def _torch(name: str) -> Trial:
    """A module of torch.nn; what it takes is known by its kind."""
    x = {1: torch.randn(2, 16, 12), 2: torch.randn(2, 16, 6, 6), 3: torch.randn(2, 16, 4, 4, 4)}
    images = next((x[n] for n in x if name.endswith(f"Conv{n}d") or name.endswith(f"ConvTranspose{n}d")), None)
    tokens = torch.randn(5, 2, 32)
    known: dict[str, tuple[Any, ...]] = {
        "AdaptiveLogSoftmaxWithLoss": (torch.randn(8, 16), torch.arange(8) * 7),
        "Bilinear": (torch.randn(4, 16), torch.randn(4, 8)),
        "GRUCell": (torch.randn(4, 16),), "LSTMCell": (torch.randn(4, 16),), "RNNCell": (torch.randn(4, 16),),
        "GRU": (torch.randn(5, 2, 16),), "LSTM": (torch.randn(5, 2, 16),), "RNN": (torch.randn(5, 2, 16),),
        "Linear": (torch.randn(4, 16),),
        "MultiheadAttention": (tokens, tokens, tokens), "TransformerEncoderLayer": (tokens,),
        "TransformerEncoder": (tokens,), "TransformerDecoderLayer": (tokens, tokens),
        "TransformerDecoder": (tokens, tokens),
    }  # fmt: skip
    return Trial(LIBRARIES["torch"].build(name), known[name] if images is None else (images,))


def _torchvision(name: str) -> Trial:
    model = LIBRARIES["torchvision"].build(name)
    video = name in import_module("torchvision.models").list_models(import_module("torchvision.models").video)
    side = 224 if name.startswith("vit") else 64
    shape = (2, 3, 8, side, side) if video else (2, 3, side, side)
    return Trial(model, (torch.randn(shape),))


def _segmentation(name: str) -> Trial:
    return Trial(LIBRARIES["segmentation_models_pytorch"].build(name), (torch.randn(2, 3, 64, 64),))


def _open_clip(name: str) -> Trial:
    """A CLIP with the named kinds of towers, made tiny."""
    models = import_module("open_clip.model")
    vision: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text: dict[str, Any] = {"context_length": 16, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2}
    if name == "CLIP (ResNet)":
        vision.update(layers=(1, 1, 1, 1), width=32, head_width=64)
    kinds = {"CLIP (ViT)": models.CLIP, "CLIP (ResNet)": models.CLIP, "CustomTextCLIP": models.CustomTextCLIP}
    if name == "CoCa":
        text.update(embed_cls=True, output_tokens=True)
        vision.update(attentional_pool=True, output_tokens=True, attn_pooler_heads=4)
        decoder = {"context_length": 16, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2}
        model = import_module("open_clip.coca_model").CoCa(32, decoder, text, vision)
    else:
        model = kinds[name](32, vision, text)
    return Trial(model, (torch.randn(2, 3, 32, 32), torch.randint(1, 96, (2, 16))))


_IMAGE, _TIME, _TOKENS = (lambda: torch.randn(2, 4, 16, 16)), (lambda: torch.tensor([3, 7])), torch.randn
DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "norm_num_groups": 8,
         "attention_head_dim": 8, "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": _IMAGE(), "timestep": _TIME()},
    ),
    "UNet2DConditionModel": (
        {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8,
         "layers_per_block": 1, "cross_attention_dim": 32, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": _IMAGE(), "timestep": _TIME(), "encoder_hidden_states": torch.randn(2, 6, 32)},
    ),
    "ControlNetModel": (
        {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8, "layers_per_block": 1,
         "cross_attention_dim": 32, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "conditioning_embedding_out_channels": (16, 32)},
        lambda: {"sample": _IMAGE(), "timestep": _TIME(), "encoder_hidden_states": torch.randn(2, 6, 32),
                 "controlnet_cond": torch.randn(2, 3, 32, 32)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": torch.randn(2, 3, 32, 32)},
    ),
    "VQModel": (
        {"block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 3,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": torch.randn(2, 3, 32, 32)},
    ),
    "AutoencoderTiny": ({}, lambda: {"sample": torch.randn(2, 3, 32, 32)}),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "sample_size": 16, "norm_num_groups": 8, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": _IMAGE(), "timestep": _TIME(), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16, "norm_num_groups": 8,
         "cross_attention_dim": 32, "caption_channels": 16, "use_additional_conditions": False},
        lambda: {"hidden_states": _IMAGE(), "timestep": _TIME(), "encoder_hidden_states": torch.randn(2, 6, 16),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
         "pooled_projection_dim": 16, "out_channels": 4},
        lambda: {"hidden_states": _IMAGE(), "timestep": _TIME(), "encoder_hidden_states": torch.randn(2, 6, 32),
                 "pooled_projections": torch.randn(2, 16)},
    ),
    "FluxTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": torch.randn(2, 16, 4), "timestep": torch.rand(2), "img_ids": torch.zeros(16, 3),
                 "encoder_hidden_states": torch.randn(2, 6, 32), "txt_ids": torch.zeros(6, 3),
                 "pooled_projections": torch.randn(2, 16)},
    ),
    "NucleusMoEImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "num_experts": 4, "moe_intermediate_dim": 24,
         "capacity_factors": 2.0},
        lambda: {"hidden_states": torch.randn(2, 16, 16), "img_shapes": [(1, 4, 4)] * 2, "timestep": torch.rand(2),
                 "encoder_hidden_states": torch.randn(2, 6, 32)},
    ),
}  # fmt: skip
"""Arguments that make a diffusers model tiny, and an input."""


def _diffusers(name: str) -> Trial:
    arguments, example = DIFFUSERS[name]
    model = getattr(import_module("diffusers.models"), name)(**arguments)
    for parameter in model.parameters():  # zero convolutions, too, are weights that can be pruned once they are trained
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return Trial(model, {**example(), "return_dict": False}, save_and_load)


def _geometric(name: str) -> Trial:
    """A convolution or a model on a random graph of ten nodes; what it takes is known by the names of its arguments."""
    model = LIBRARIES["torch_geometric"].build(name)
    edges = torch.randint(10, (2, 40))
    types = {"node_type": torch.randint(3, (10,)), "edge_type": torch.randint(4, (40,))}
    known = {
        **types,
        "x": torch.randn(10, 16), "x_0": torch.randn(10, 16), "edge_index": edges, "adj_t": edges,
        "edge_attr": torch.randn(40, 8), "hyperedge_index": edges, "type_vec": torch.randint(3, (10,)),
        "pos": torch.randn(10, 3), "batch": torch.zeros(10, dtype=torch.long), "z": torch.randint(5, (10,)),
    }  # fmt: skip
    required = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if (parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        or name in types
    ]
    return Trial(model, {name: known[name] for name in required})


TRIALS: dict[str, Callable[[str], Trial]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "diffusers": _diffusers,
    "torch_geometric": _geometric,
    "segmentation_models_pytorch": _segmentation,
    "open_clip": _open_clip,
}


def trial(library: str, name: str) -> Trial:
    """A small model of a library with weights of seed 0."""
    torch.manual_seed(0)
    return TRIALS[library](name)


def names(library: str) -> list[str]:
    """The models of a library that have a real run."""
    known = LIBRARIES[library].names
    if library == "open_clip":
        return ["CLIP (ViT)", "CLIP (ResNet)", "CustomTextCLIP", "CoCa"]
    if library == "diffusers":
        return list(DIFFUSERS)
    if library == "torchvision":
        return ["densenet121", "efficientnet_b0", "lraspp_mobilenet_v3_large", "mnasnet0_5", "mobilenet_v3_small",
                "r3d_18", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
                "vit_b_32"]  # fmt: skip
    if library == "segmentation_models_pytorch":
        return ["Unet(mobilenet_v2)", "FPN(resnet18)", "Unet(mit_b0)", "DeepLabV3Plus(mobilenet_v2)",
                "PSPNet(resnet18)", "Linknet(resnet18)"]  # fmt: skip
    return known()
