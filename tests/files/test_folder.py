"""A model's folder: what is pruned, copied and left out, and that the result loads by from_pretrained."""

import json
import os

import pytest
import torch
from checkpoints import shard, weights, write
from helpers import import_transformers
from torch import nn

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files import weights as files
from torch_sap.files.folder import Companions, companions
from torch_sap.files.weights import prune_checkpoint

RULE = Hyperparameters(eta_r=0.1)


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder


COPIED = ("README.md", "config.json", "modeling_tiny.py", "spiece.model", "templates/tool.jinja", "tokenizer.json")
LEFT_OUT = ("checkpoint-500/", "model.onnx", "onnx/", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.fixture
def model(tmp_path):
    """A folder with a sharded checkpoint and much else."""
    folder = shard(weights(), tmp_path / "in")
    fill(
        folder, "config.json", "tokenizer.json", "spiece.model", "modeling_tiny.py", "README.md", "templates/tool.jinja"
    )
    fill(folder, ".git/config", ".cache/x", ".gitattributes", "config.json.12-deadbeef.tmp", "templates/.hidden")
    fill(folder, "pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "training_args.bin")
    return fill(
        folder, "onnx/model.onnx", "onnx/config.json", "checkpoint-500/config.json", "checkpoint-500/optimizer.pt"
    )


COPIED = ("README.md", "config.json", "modeling_tiny.py", "spiece.model", "templates/tool.jinja", "tokenizer.json")
LEFT_OUT = ("checkpoint-500/", "model.onnx", "onnx/", "pytorch_model.bin", "pytorch_model.bin.index.json")


def listed(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_what_is_copied_and_what_is_left_out(model, tmp_path):
    found = companions(model, tmp_path / "out")
    assert found == Companions(COPIED, (*LEFT_OUT, "training_args.bin"))
    shards = [file.name for file in model.glob("model*.safetensors*")]
    out = tmp_path / "deep" / "out"
    prune_checkpoint(model, out, "layer", RULE)
    assert listed(out) == sorted([*COPIED, *shards])
    for name in COPIED:
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_modules_of_sentence_transformers_are_copied(model, tmp_path):
    fill(model, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    assert "2_Dense/" in companions(model, tmp_path / "out").left_out
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    found = companions(model, tmp_path / "out")
    assert {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} < set(found.copied)
    (model / "modules.json").write_text('{"not": "a list of modules"}')
    assert "2_Dense/" in companions(model, tmp_path / "out").left_out


def test_nothing_is_copied_from_a_file_or_into_its_own_folder(model, tmp_path):
    assert companions(model / "model.safetensors.index.json", tmp_path / "out") == Companions()
    assert companions(model, model) == Companions()
    before = {name: (model / name).read_bytes() for name in listed(model)}
    prune_checkpoint(model, model, "layer", RULE, overwrite=True)
    assert listed(model) == sorted(before)
    assert {name for name in before if before[name] != (model / name).read_bytes()} == {
        name for name in before if name.startswith("model-")
    }


def test_an_output_inside_the_folder_is_not_copied_into_itself(model):
    first, second = model / "pruned", model / "templates" / "pruned"
    prune_checkpoint(model, first, "layer", RULE)
    prune_checkpoint(model, first, "layer", RULE, overwrite=True)
    assert set(COPIED) < set(listed(first))
    fill(second, "notes.txt")
    assert companions(model, second).copied == COPIED


def test_links_as_in_a_cache_of_the_hub(model, tmp_path):
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in model.iterdir():
        (links / file.name).symlink_to(file)
    (links / "broken.json").symlink_to(tmp_path / "nowhere")
    prune_checkpoint(links, tmp_path / "out", "layer", RULE)
    assert set(COPIED) < set(listed(tmp_path / "out"))
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_what_exists_is_not_overwritten_unless_asked(model, tmp_path):
    out = fill(tmp_path / "out", "templates/tool.jinja", "other.txt")
    with pytest.raises(FileExistsError, match=r"out/templates/tool\.jinja exists; choose another name, or overwrite"):
        prune_checkpoint(model, out, "layer", RULE)
    assert listed(out) == ["other.txt", "templates/tool.jinja"]
    (out / "templates/tool.jinja").write_text("old")
    prune_checkpoint(model, out, "layer", RULE, overwrite=True)
    assert (out / "templates/tool.jinja").read_text() == "this is templates/tool.jinja"
    assert (out / "other.txt").exists()


@pytest.mark.parametrize("where", ["weights", "copying", "flushing"])
def test_nothing_is_left_of_a_failure(model, tmp_path, monkeypatch, where):
    if where == "weights":
        write({"a.weight": torch.full((3, 3), float("nan"))}, model / "model-00001-of-00002.safetensors")
    elif where == "copying":
        copy = files.shutil.copyfile
        monkeypatch.setattr(files.shutil, "copyfile", lambda a, b: copy(a, b) if a.name != "tool.jinja" else 1 / 0)
    else:
        monkeypatch.setattr(files.MappedFile, "flush", lambda _: 1 / 0)
    before = listed(model)
    with pytest.raises((ValueError, ZeroDivisionError)):
        prune_checkpoint(model, tmp_path / "a" / "b", "layer", RULE)
    assert os.listdir(tmp_path) == ["in"]
    assert listed(model) == before


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("scope", ["global", "neuron"])
def test_from_pretrained(size, scope, tmp_path):
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=False, torch_dtype="float32")
    dense = transformers.LlamaForCausalLM(config)
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path / "in", max_shard_size=size)
    vocabulary = {f"word{i}": i for i in range(63)} | {"?": 63}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "in")
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", scope, RULE)
    assert listed(tmp_path / "out") == listed(tmp_path / "in")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if size == "1GB" else 6)
    sparse = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparse.generation_config.max_new_tokens == 7
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("word5")["input_ids"] == [5]
    state = sparse.state_dict()
    assert sum(int((state[record.name] == 0).sum()) for record in report.tensors) == report.pruned > 0
    for name, value in dense.state_dict().items():
        assert torch.equal(torch.where(state[name] == 0, 0, value), state[name])


def test_a_folder_of_a_pytorch_file(tmp_path):
    fill(tmp_path / "in", "config.json", "tf_model.h5")
    write(nn.Linear(40, 30).state_dict(), tmp_path / "in" / "pytorch_model.bin")
    prune_checkpoint(tmp_path / "in", tmp_path / "out", "layer", RULE)
    assert listed(tmp_path / "out") == ["config.json", "pytorch_model.bin"]
