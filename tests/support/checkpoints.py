"""Checkpoints for the tests of files, and the model in memory that has the same weights in the same order."""

import json

import torch
from helpers import FUNCTIONS
from safetensors.torch import save_file
from torch import nn

import torch_sap


def weights(dtype=torch.float32, seed=0):
    """A state_dict: layers of several sizes and scales, ties at the threshold, zeros, and what is not pruned."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tied = (normal(60, 70) * 4).round() / 4
    dead = normal(33, 17)
    dead[4:6] = 0
    return {
        "stem.weight": normal(8, 3, 3, 3),
        "stem.bias": normal(8),
        "norm.weight": normal(8),
        "steps": torch.tensor(7),
        "body.tied.weight": tied,
        "body.dead.weight": dead,
        "body.wide.weight": normal(5, 9001, scale=0.3),
        "body.rows.in_proj_weight": normal(700, 64, scale=0.5) * torch.rand(700, 1, generator=generator).to(dtype),
        "body.none.weight": normal(0, 5),
        "position": normal(4, 4),
        "head.weight": torch.zeros(10, 64, dtype=dtype),
    }


def write(values, path, **metadata):
    """Write a state_dict in the format of the path's suffix."""
    if path.suffix == ".safetensors":
        save_file(values, path, metadata=metadata or {"format": "pt"})
    else:
        torch.save(values, path)
    return path


def misalign(path):
    """Lengthen the header of a safetensors file by one blank, so that every tensor lies at an odd place."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + whole[8 : 8 + length] + b" " + whole[8 + length :])
    return path


def shard(values, folder):
    """Write a state_dict as two safetensors files with an index, in a folder."""
    folder.mkdir()
    names = list(values)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = {f"model-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
    for file, half in files.items():
        save_file({name: values[name] for name in half}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, half in files.items() for name in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pruned_in_memory(values, scope, **numbers):
    """The state_dict after the whole-model function of a scope, and its report; the order is that of the values."""
    model = nn.Module()
    for name, value in values.items():
        *path, own = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(own, nn.Parameter(value.clone(), requires_grad=False))
    report = FUNCTIONS[scope](model, **numbers)
    return torch_sap.remove(model).state_dict(), report
