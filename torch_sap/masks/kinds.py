"""Which parameters are weights, and which of their dimensions counts output channels: one table of module kinds.

A weight is what a linear map or a convolution multiplies. By the paper's rule that is a parameter with more than one
dimension and "weight" in its own name; the table knows the kinds of modules for which the rule or the axis is another.
Classes are known by the names of their package and of the class, so that no package has to be imported.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList


class Axes(NamedTuple):
    """How the output channels lie in a weight; the fields are those of :class:`torch_sap.decide.groups.Entry`."""

    channel_dim: int = 0
    channel_groups: int = 1
    experts: int = 0


ROWS, COLUMNS = Axes(0), Axes(1)

MAPS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, _ConvNd)
"""Modules whose own weights are weights, whatever their shape."""

TABLE, VECTOR, NORM, BIAS = "a lookup table", "a vector", "a norm scale", "a bias"
UNNAMED = 'no "weight" in its name'
EXCLUDED, ZERO, COMPUTED = "excluded", "zero throughout", "a part of a computed weight"
"""Why a parameter is left out. Only UNNAMED may be a mistake."""

STACKS = {
    "diffusers.SwiGLUExperts": COLUMNS,
    "transformers.CsmCodebooksHead": COLUMNS,
    "transformers.DbrxExpertGLU": ROWS,
    "transformers.GraniteMoeParallelExperts": ROWS,
    "transformers.JetMoeParallelExperts": ROWS,
    "transformers.Llama4TextExperts": COLUMNS,
    "transformers.RecurrentGemmaRglru": COLUMNS,
    "transformers.ZambaMambaMixer": ROWS,
    "torch_geometric.ARMAConv": COLUMNS,
    "torch_geometric.GatedGraphConv": COLUMNS,
    "torch_geometric.HeteroLinear": COLUMNS,
    "torch_geometric.Linear": COLUMNS,  # that of DNAConv; the other one has two dimensions
    "torch_geometric.RGATConv": COLUMNS,
    "torch_geometric.RGCNConv": COLUMNS,
    "torchtitan.GroupedExperts": ROWS,
    "torchtune.GroupedExperts": COLUMNS,
}
"""Modules that stack matrices along dimension 0 of a parameter: (matrix, output, input) or (matrix, input, output)."""

TRANSPOSED = {
    "torch_geometric.GCN2Conv",
    "torch_geometric.SparseLinear",
    "transformers.Conv1D",
    "transformers.Gemma3MultiModalProjector",
    "transformers.Inkling2DynamicShortConvolution",
    "transformers.Inkling2LoopDynamicShortConvolution",
    "transformers.T5Gemma2MultiModalProjector",
}
"""Modules that store (input, output)."""

NAMED = {
    "open_clip.CLIP": "text_projection",
    "open_clip.MultimodalTransformer": "text_projection",
    "open_clip.TextTransformer": "text_projection",
    "open_clip.VisionTransformer": "proj",
    "torch_geometric.GMMConv": "g",
    "torch_geometric.RGCNConv": "root",
    "transformers.Inkling2LoopRelativePositionBias": "proj",
    "transformers.Inkling2RelativePositionBias": "proj",
    "transformers.InklingRelativeLogits": "proj",
    "transformers.OmDetTurboLanguageBackbone": "text_projection",
    "transformers.XCLIPModel": "prompts_visual_projection",
}
"""Modules that multiply by a matrix (input, output) without "weight" in its name, and its name."""

EXPERT_NAMES = {"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "v1"}
"""Parameters of such modules that are weights without "weight" in their names."""

TRANSPOSED_ON_DISK = {
    "gpt2": r"\.(c_attn|c_fc|c_proj|q_attn)\.weight$",
    "openai-gpt": r"\.(c_attn|c_fc|c_proj)\.weight$",
    "imagegpt": r"\.(c_attn|c_fc|c_proj|q_attn)\.weight$",
    "decision_transformer": r"\.(c_attn|c_fc|c_proj|q_attn)\.weight$",
    "clvp": r"\.(c_attn|c_fc|c_proj)\.weight$",
    "gemma3": r"mm_input_projection_weight$",
    "gpt_oss": r"\.(gate_up_proj|down_proj)$",
    "aria": r"\.experts\.fc[12]\.weight$",
    "llama4": r"\.(gate_up_proj|down_proj)$",
    "llama4_text": r"\.(gate_up_proj|down_proj)$",
    "openai_privacy_filter": r"\.(gate_up_proj|down_proj)$",
}
"""By the ``model_type`` of a config.json, the names of the weights that are stored as (input, output) in its files."""

TABLE_NAME = re.compile(r"(^|_)(wte|wpe|shared|embed(ding)?s?(?!_out)(_\w+)?|relative_attention_bias)$")
"""The name of a module in a file that is a lookup table, if its weight is a matrix."""


def kind_of(module: nn.Module, name: str, shape: tuple[int, ...]) -> Axes | str:
    """The axes of a parameter that is a weight, or why it is none.

    Args:
        module: The module that has it.
        name: Its name in the module before pruning.
        shape: Its shape; for one that is not initialized yet any with two dimensions.
    """
    keys = {_key(kind) for kind in type(module).__mro__}
    if stack := _stack(module, name, shape, keys):
        return stack
    if len(shape) == 2 and any(NAMED.get(key) == name for key in keys):
        return COLUMNS
    if "weight" not in name:
        return COMPUTED if isinstance(module, ParametrizationList) else _unnamed(name, shape)
    own = name == "weight" or isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    if own and isinstance(module, MAPS) and len(shape) > 1:
        return Axes(1, module.groups) if isinstance(module, _ConvTransposeNd) else ROWS
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Embedding" in type(module).__name__:
        return TABLE
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or re.search(r"Norm(\dd)?$", type(module).__name__):
        return NORM
    if isinstance(module, _ConvTransposeNd) and len(shape) > 2:  # weight_v of weight_norm
        return _vector(shape) or Axes(1, module.groups)
    return _vector(shape) or (COLUMNS if keys & TRANSPOSED else ROWS)


def _key(kind: type) -> str:
    """A class by its package and its name; code that transformers loads from a hub counts as its own."""
    return f"{kind.__module__.partition('.')[0].removesuffix('_modules')}.{kind.__name__}"


def _unnamed(name: str, shape: tuple[int, ...]) -> str:
    return BIAS if "bias" in name else _vector(shape) or UNNAMED


def _vector(shape: tuple[int, ...]) -> str | None:
    return VECTOR if sum(size != 1 for size in shape) < 2 else None


def _stack(module: Any, name: str, shape: tuple[int, ...], keys: set[str]) -> Axes | None:
    """The axes of a parameter that stacks matrices."""
    known = next((STACKS[key] for key in sorted(keys & STACKS.keys())), None)
    if known is None and any(key.startswith("transformers.") and "Experts" in key for key in keys):
        known = COLUMNS if getattr(module, "is_transposed", False) else ROWS
    if known is None or not (name in EXPERT_NAMES or "weight" in name):
        return None
    if "transformers.DbrxExpertGLU" in keys:
        return Axes(int(name == "w2"), 1, module.moe_num_experts)
    return known._replace(experts=max(shape[0], 1)) if len(shape) == 3 else None


def kind_on_disk(name: str, shape: tuple[int, ...], model_type: str = "", *, tied: bool = False) -> Axes | str:
    """The same for a tensor in a file, by its path there, and the model's type and whether it ties its token table.

    Without a type output channels are dimension 0, since a file does not say which weights belong to what.
    """
    path, _, own = name.rpartition(".")
    transposed = re.search(TRANSPOSED_ON_DISK.get(model_type, "$^"), name)
    if own in EXPERT_NAMES and len(shape) == 3:
        return (COLUMNS if transposed else ROWS)._replace(experts=shape[0])
    if "weight" not in own:
        return _unnamed(own, shape)
    if len(shape) == 2 and TABLE_NAME.search(path.rpartition(".")[2]):
        return ROWS if tied and not re.search("pos|wpe|type|rel", path.rpartition(".")[2]) else TABLE
    if transposed:
        return COLUMNS if len(shape) == 2 else COLUMNS._replace(experts=shape[0])
    return _vector(shape) or ROWS
