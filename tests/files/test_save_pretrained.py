"""What save_pretrained of transformers, PEFT, diffusers and the hub's mixin writes of a pruned model loads as it is."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from helpers import import_transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files.weights import prune_checkpoint

transformers = import_transformers()
IDS = torch.arange(1, 9)[None]


def gpt2(kind=transformers.GPT2LMHeadModel):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return kind(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


def llama(tied=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


MAKE = {"gpt2": gpt2, "llama, tied": llama, "llama": lambda: llama(tied=False)}
each_model = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def outputs(model):
    with torch.no_grad():
        return model(IDS)[0]


def assert_loads_alike(model, folder, **options):
    before = list(model.state_dict())
    expected = outputs(model)
    model.save_pretrained(folder, **options)
    assert list(model.state_dict()) == before
    assert torch.equal(outputs(type(model).from_pretrained(folder).eval()), expected)


@each_model
@pytest.mark.parametrize("size", ["1GB", "20KB"])
@pytest.mark.parametrize(
    "given", [None, torch_sap.dense_state_dict, nn.Module.state_dict], ids=["own", "dense", "pruned"]
)
def test_a_pruned_model(make, size, given, tmp_path):
    model = make()
    torch_sap.layer_unstructured(model)
    options = {} if given is None else {"state_dict": given(model)}
    assert_loads_alike(model, tmp_path, max_shard_size=size, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")


@each_model
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(make, how, tmp_path):
    model = make()
    torch_sap.global_unstructured(model)
    assert_loads_alike(how(model), tmp_path)


def test_some_modules_and_a_model_inside_another(tmp_path):
    model = gpt2()
    torch_sap.neuron_unstructured([(model.transformer.h[0].mlp.c_fc, "weight")])
    assert_loads_alike(model, tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "inner")
    inner = transformers.GPT2Model.from_pretrained(tmp_path / "inner").eval()
    assert torch.equal(outputs(inner), outputs(model.transformer))


def test_methods_of_pytorch(tmp_path):
    model = llama(tied=False)
    linear = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(linear, pruning_method=torch_sap.PQIGlobal, eta_r=0.5)
    assert_loads_alike(model, tmp_path)
    tied = llama()
    prune.l1_unstructured(tied.lm_head, "weight", 0.5)  # the embedding stays dense, as no plain model's does
    with pytest.warns(UserWarning, match="are one parameter, but PyTorch's masks prune it differently"):
        tied.save_pretrained(tmp_path / "tied")


def test_after_training_and_removal(tmp_path):
    model = gpt2().train()
    torch_sap.layer_unstructured(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)  # writes that no forward has seen
    model.save_pretrained(tmp_path / "a")
    assert_loads_alike(model.eval(), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert_loads_alike(torch_sap.remove(model), tmp_path / "c")


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = gpt2()
    torch_sap.layer_unstructured(model)
    data = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
    often = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    often["greater_is_better"] = True  # of losses that fall: not the last one is loaded, into the pruned model
    options = transformers.TrainingArguments(
        str(tmp_path), **often, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer
        trainer = transformers.Trainer(model, options, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / "end"))
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    for folder in (best, tmp_path / "end"):
        assert torch.equal(outputs(gpt2().from_pretrained(folder).eval()), outputs(model.eval()))


def classifier():
    return gpt2(transformers.GPT2ForSequenceClassification)


@pytest.mark.parametrize("order", ["prune, wrap", "wrap, prune"])
def test_adapters(order, tmp_path):
    peft = pytest.importorskip("peft")
    base = classifier()
    if order == "prune, wrap":
        torch_sap.layer_unstructured(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: fan_in_fan_out
        config = peft.LoraConfig(target_modules=["c_attn"], r=4, task_type="SEQ_CLS", init_lora_weights=False)
        model = peft.get_peft_model(base, config).eval()
        if order == "wrap, prune":
            torch_sap.layer_unstructured(model, eta_r=0.5)
        expected = outputs(model)
        model.save_pretrained(tmp_path)
        dense = torch_sap.dense_state_dict(model.base_model.model)
        own = {key.replace("base_layer.", "").replace("original_module.", ""): key for key in dense}
        base = classifier()
        base.load_state_dict({name: dense[key] for name, key in own.items() if name in base.state_dict()})
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(outputs(loaded), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.requires_grad)  # of adapters and the head
        assert not torch.equal(outputs(model), expected)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(outputs(model.eval()), expected)
    assert not any("_orig" in key or "_mask" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_the_mixin_of_the_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class HubNet(Net, hub.PyTorchModelHubMixin):
        pass

    model = HubNet(width=16)
    torch_sap.layer_unstructured(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(HubNet.from_pretrained(tmp_path)(x), model(x))


def test_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(8, **blocks, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8)
    torch_sap.layer_unstructured(model)
    expected = torch_sap.dense_state_dict(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    for folder in ("whole", "shards", "pipeline/unet"):
        found = diffusers.UNet2DModel.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        json.loads((tmp_path / folder / "config.json").read_text())


def test_sentence_transformers(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "bert")
    words = Tokenizer(WordLevel({"word": 0, "?": 1, "[PAD]": 2}, unk_token="?"))
    special = {"unk_token": "?", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "bert")
    layers = [models.Transformer(str(tmp_path / "bert")), models.Pooling(32), models.Dense(32, 24)]
    model = sentences.SentenceTransformer(modules=layers, device="cpu")
    torch_sap.layer_unstructured(model)
    expected = model.encode(["word"])
    model.save_pretrained(str(tmp_path / "a"))
    assert (sentences.SentenceTransformer(str(tmp_path / "a"), device="cpu").encode(["word"]) == expected).all()
    prune_checkpoint(tmp_path / "a", tmp_path / "b", "layer", Hyperparameters(gamma=0.0))  # prunes nothing
    assert (sentences.SentenceTransformer(str(tmp_path / "b"), device="cpu").encode(["word"]) == expected).all()


def test_a_dense_model_is_saved_by_the_librarys_own_code(tmp_path):
    torch_sap.layer_unstructured(gpt2())
    model = llama(tied=False)
    state = {**model.state_dict(), "extra_orig": torch.ones(1), "extra_mask": torch.ones(1)}  # somebody's own names
    names = set(state)
    model.save_pretrained(tmp_path, state_dict=state)
    assert set(load_file(tmp_path / "model.safetensors")) == names
