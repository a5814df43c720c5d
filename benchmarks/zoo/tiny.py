"""A tiny model of any transformers architecture with random values, and an input that it computes with.

Sizes are replaced by their names in the configuration, and in those that it holds. What that does not fit is left out:
the CSV file names it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.libraries import transformers_classes

VOCABULARY = 96
SIZES: list[tuple[str, Any]] = [
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions|max_target_positions)$", 64),
    (r"vocab(ulary)?_size", VOCABULARY),
    (r"(num_|n_)?(key_value|kv)_heads", 2),
    (r"(num_|n_)?(attention_|attn_)?heads?$|attention_heads$|num_heads$|^n_head$", 4),
    (r"(intermediate|ffn|inner|feed_forward|mlp|moe)_?(size|dim|hidden_size)$|^d_ff$|^n_inner$|^ffn_dim$", 48),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"^(num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|num_experts_per_token|moe_k)$", 2),
    (r"^(n_group|topk_group|first_k_dense_replace|n_shared_experts|num_nextn_predict_layers)$", 1),
    (r"^(num_|n_)?(hidden_|encoder_|decoder_)?layers?$|^(num_)?(encoder|decoder)_(hidden_)?layers$|^depth$", 2),
    (r"^(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|hidden_dim|d_embed)$", 32),
    (r"^(projection_dim|proj_dim|word_embed_proj_dim|embedding_dim|out_hidden_size|lru_width)$", 32),
    (r"^(head_dim|v_head_dim|qk_nope_head_dim|d_kv|d_head|attention_head_dim)$", 8),
    (r"^(qk_rope_head_dim|q_lora_rank|kv_lora_rank)$", 8),
    (r"^(image_size|img_size)$", 32),
    (r"^patch_size$", 8),
    (r"^(num_queries|num_query_tokens|num_latents)$", 6),
]
"""Patterns of the names of sizes, and the tiny size; the first that fits counts."""

_CONVOLUTIONS = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 128, "window_size": 4}
_DETR = {"decoder_layers": 2, "encoder_layers": 1, "num_queries": 5, "backbone_config": {
    "model_type": "resnet", "embedding_size": 8, **_CONVOLUTIONS, "out_features": ["stage4"]}}  # fmt: skip

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ConditionalDetrConfig": _DETR,
    "ConvNextConfig": _CONVOLUTIONS,
    "ConvNextV2Config": _CONVOLUTIONS,
    "DetrConfig": _DETR,
    "DonutSwinConfig": _SWIN,
    "GPTJConfig": {"rotary_dim": 4},
    "CodeGenConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 16, "n_groups": 1},
    "Mask2FormerConfig": {
        "backbone_config": {"model_type": "swin", **_SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5,
    },
    "RegNetConfig": {**_CONVOLUTIONS, "embedding_size": 8, "groups_width": 8},
    "ResNetConfig": {**_CONVOLUTIONS, "embedding_size": 8},
    "SamMaskDecoderConfig": {"iou_head_hidden_dim": 16},
    "SamVisionConfig": {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "TableTransformerConfig": _DETR,
    "XLNetConfig": {"d_head": 8},
}  # fmt: skip
"""By the name of a configuration class, arguments that the rules above do not find."""


def tiny_configuration(kind: Any) -> Any:
    """A configuration of a class with the sizes above, also within its parts."""
    default = kind()
    arguments: dict[str, Any] = {}
    parts = getattr(kind, "sub_configs", None) or {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in parts:
            continue
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            arguments[name] = VOCABULARY - 1 - len(arguments) % 20
        elif isinstance(value, int) and not isinstance(value, bool):
            tiny = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
            if tiny is not None and value > tiny:
                arguments[name] = tiny
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and type(part).__module__.startswith("transformers.models"):
            arguments[name] = tiny_configuration(type(part))
    if hasattr(default, "kv_lora_rank"):  # latent attention has as many keys as queries
        arguments["num_key_value_heads"] = 4
    return kind(**{**arguments, **EXCEPTIONS.get(kind.__name__, {})})


def tiny_model(name: str) -> nn.Module:
    """The first model of a configuration class that can be made tiny, with weights of seed 0, in eval mode."""
    errors: list[Exception] = []
    for kind, model in transformers_classes(name):
        try:
            with torch.device("meta"):
                built = model(tiny_configuration(kind))
            if sum(parameter.numel() for parameter in built.parameters()) > 20_000_000:
                raise ValueError("the tiny configuration is not tiny")
            torch.manual_seed(0)
            return model(tiny_configuration(kind)).eval()
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _configurations(configuration: Any) -> Iterator[Any]:
    yield configuration
    for name in getattr(configuration, "sub_configs", None) or {}:
        part = getattr(configuration, name, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from _configurations(part)


def _first(configuration: Any, names: tuple[str, ...], default: Any) -> Any:
    """A value of a configuration or of its parts."""
    for one in _configurations(configuration):
        for name in names:
            if (value := getattr(one, name, None)) is not None:
                return value[0] if isinstance(value, (list, tuple)) else value
    return default


def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, by the names that the model's forward takes: all that are known, then fewer."""
    known = set(inspect.signature(model.forward).parameters)
    torch.manual_seed(1)
    configuration = model.config
    side, channels = _first(configuration, ("image_size", "img_size"), 32), _first(configuration, ("num_channels",), 3)
    tokens = torch.randint(5, VOCABULARY // 2, (2, 16))
    bins = _first(configuration, ("num_mel_bins", "feature_size", "n_mels"), 80)
    frames = 2 * _first(configuration, ("max_source_positions",), 32)
    text = {
        "input_ids": tokens,
        "decoder_input_ids": tokens.flip(0),
        "bbox": torch.arange(4).expand(2, 16, 4) * 4,
    }
    for pixels in (
        torch.randn(2, channels, side, side),
        torch.randn(2, 4, channels, side, side),
        torch.randn(2, channels, 64, 64),
        torch.randn(2, channels, 224, 224),
    ):
        media = {
            "pixel_values": pixels,
            "pixel_values_videos": torch.randn(2, 4, channels, side, side),
            "input_values": torch.randn(2, 4000),
            "input_features": torch.randn(2, bins, frames),
        }
        both = {name: value for name, value in {**text, **media}.items() if name in known}
        some = {name: value for name, value in media.items() if name in known}
        words = {name: value for name, value in text.items() if name in known}
        yield from (one for one in (both, some, words) if one)
    for other in (
        {"input_features": torch.randn(2, frames, bins)},
        {"input_values": torch.randn(2, 1, 4000)},
        {"input_values": torch.randn(2, 64, 80)},
    ):
        if other.keys() <= known:
            yield {**{name: value for name, value in text.items() if name in known}, **other}


def leaves(output: Any) -> list[Tensor]:
    """The tensors of an output, without caches."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [leaf for value in values for leaf in leaves(value)]


def workable(model: nn.Module) -> dict[str, Any]:
    """The first input with which the dense model computes something finite that has gradients."""
    errors: list[Exception] = []
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for tensors in inputs(model):
        example = {**tensors, **no_cache}
        try:
            found = [leaf for leaf in leaves(model(**example)) if leaf.is_floating_point()]
            if not found or not all(one.isfinite().all() for one in found):
                raise ValueError("nothing finite comes out")
            sum(one.square().mean() for one in found).backward()
            model.zero_grad()
            return example
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else ValueError("no known input")
