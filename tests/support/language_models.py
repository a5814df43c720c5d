"""A tiny language model, its data, and a quiet Trainer."""

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LR = 1e-2
BATCHES = 4  # per epoch


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config)  # with dropout


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, attention_dropout=0.1))


def data(number=8 * BATCHES):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 32, (number, 12), generator=generator).cumsum(1) % 31 + 1
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, callbacks, model=None, epochs=6, kind=Trainer, optimizers=(None, None), **settings):
    settings = {"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1} | settings
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=LR,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    model = gpt2() if model is None else model
    return kind(
        model, arguments, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks), optimizers=optimizers
    )
