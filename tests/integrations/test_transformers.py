"""The callback for transformers' Trainer: rounds, rates, checkpoints, and what is saved at the end."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_held, import_transformers
from iterating import state_without_masks
from torch import nn

from torch_sap import remove
from torch_sap.files.checkpoint import read

transformers = import_transformers()

from language_models import BATCHES, LR, data, gpt2, llama, trainer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.trainer_callback import EarlyStoppingCallback  # noqa: E402

from torch_sap.integrations.transformers import FILE, SAPCallback  # noqa: E402

SETTINGS = {"p": 1.0, "q": 2.0, "beta": 0.5}
SCRIPT = Path(__file__).parents[1] / "support" / "killed_trainer.py"


class Watch(transformers.TrainerCallback):
    """What is there before each step of the optimizer, and the state at the start of each epoch."""

    def __init__(self):
        self.rates, self.starts = [], []

    def on_step_begin(self, args, state, control, model, optimizer, **given):
        if state.global_step % BATCHES == 0:
            trained = [value for each in optimizer.state.values() for value in each.values()]
            masks = {key[:-5]: value.clone() for key, value in model.state_dict().items() if key.endswith("_mask")}
            self.starts.append((state_without_masks(model), masks, len(trained)))

    def on_pre_optimizer_step(self, args, state, control, optimizer, **given):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def assert_same(trained, expected):
    """Check that two Trainers have arrived at the same weights, masks and rounds, to the bit."""
    (model, callback), (other, of_other) = trained, expected
    assert list(model.state_dict()) == list(other.state_dict())
    for (key, value), same in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same), key
    rounds = [each.history.to_dict()["rounds"] for each in (callback, of_other)]
    for one, two in zip(*rounds, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def run(folder, rounds=3, epochs_per_round=2, make=gpt2, resume=None, others=(), callback=None, **settings):
    callback = callback or SAPCallback(epochs_per_round, **SETTINGS)
    made = make()
    if resume:  # whatever its weights are
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    training = trainer(folder, [callback, *others], model=made, epochs=rounds * epochs_per_round, **settings)
    training.train(resume_from_checkpoint=resume)
    return training.model, callback


def zeros_of(model):
    return sum(int((parameter == 0).sum()) for parameter in model.parameters() if parameter.dim() > 1)


def checkpoints(folder):
    return sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def test_rounds_start_from_the_start_with_a_fresh_optimizer(tmp_path):
    watch = Watch()
    model, callback = run(tmp_path, others=[watch], eval_strategy="epoch")
    first = watch.starts[0][0]
    for number in (0, 2, 4):
        state, masks, trained = watch.starts[number]
        assert trained == 0
        for key, value in state.items():
            assert torch.equal(value, first[key] * masks[key] if key in masks else first[key]), key
    assert watch.starts[1][2] > 0
    assert [found.pruned is None for found in callback.history] == [False, False, True]
    assert all(set(found.metrics) == {"eval_loss"} for found in callback.history)
    assert callback.history[2].remaining < callback.history[1].remaining < callback.history[0].remaining
    assert_held(model)


SCHEDULES = {
    "linear": {},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0}},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_rounds_have_the_rates_of_one_schedule(tmp_path, name, unit):
    watch, steps = Watch(), 2 * BATCHES
    callback = SAPCallback(2) if unit == "epochs" else SAPCallback(steps_per_round=steps)
    run(tmp_path, callback=callback, others=[watch], eval_strategy="epoch", **SCHEDULES[name])
    assert watch.rates[:steps] == watch.rates[steps : 2 * steps] == watch.rates[2 * steps :]
    assert len(watch.rates) == 3 * steps
    assert len(set(map(tuple, watch.rates[:steps]))) > 1
    if name == "linear":
        assert watch.rates[0] == [LR, LR]
        assert watch.rates[steps - 1][0] == pytest.approx(LR / steps)
    assert len(callback.history) == 3


def test_a_scheduler_that_the_user_gives_is_for_one_round(tmp_path):
    model, watch, steps = gpt2(), Watch(), 2 * BATCHES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1)
    run(tmp_path, make=lambda: model, others=[watch], optimizers=(optimizer, scheduler))
    assert watch.rates[:steps] == watch.rates[steps : 2 * steps] == watch.rates[2 * steps :]
    assert len(set(map(tuple, watch.rates))) > 3


def test_without_rewinding_one_schedule_runs_through_all_rounds(tmp_path):
    watch = Watch()
    run(tmp_path, callback=SAPCallback(2, rewind="none"), others=[watch])
    assert [rate for rate, _ in watch.rates] == pytest.approx([LR * (1 - step / 24) for step in range(24)])
    assert all(trained > 0 for *_, trained in watch.starts[1:])


SITUATIONS = {
    "epochs": {"save_strategy": "epoch", "eval_strategy": "epoch"},
    "steps inside of epochs": {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1},
    "bf16": {"bf16": True, "save_strategy": "epoch"},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "save_strategy": "steps", "save_steps": 5},
    "plateau": {**SCHEDULES["plateau"], "save_strategy": "epoch", "eval_strategy": "epoch"},
}


@pytest.mark.parametrize(
    "name", [name if name == "epochs" else pytest.param(name, marks=pytest.mark.slow) for name in SITUATIONS]
)
def test_resumes_from_any_checkpoint(tmp_path, name):
    settings = SITUATIONS[name]
    expected = run(tmp_path, **settings)
    paths = checkpoints(tmp_path)
    assert len(paths) >= 5
    for path in paths[:: max(len(paths) // 3, 1)]:
        assert_same(run(tmp_path / "other", resume=path, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("callback", [{"steps_per_round": 5}, {"steps_per_round": 6, "rewind": 2}])
def test_resumes_in_rounds_of_steps(tmp_path, callback):
    def training(**settings):
        made = SAPCallback(**callback, **SETTINGS)
        return run(tmp_path / "a", callback=made, make=llama, save_strategy="steps", save_steps=1, **settings)

    expected = training()
    assert len(expected[1].history) == -(-24 // callback["steps_per_round"])
    for path in checkpoints(tmp_path / "a")[1::8]:
        assert_same(training(resume=path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rewind", [1, "none"])
def test_resumes_with_late_rewinding_and_without(tmp_path, rewind):
    def training(**settings):
        callback = SAPCallback(2, rewind=rewind, **SETTINGS)
        return run(tmp_path / "a", callback=callback, save_strategy="steps", save_steps=2, **settings)

    expected = training()
    for path in checkpoints(tmp_path / "a")[:6:2]:  # also at the moment of the rewind point, and inside the next epoch
        assert_same(training(resume=path), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loaded state_dict has plain weights:UserWarning")  # before we refuse that
def test_resumes_in_the_same_process_with_the_same_trainer(tmp_path):
    class Interrupt(transformers.TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **given):
            if state.global_step == 14 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    expected = run(tmp_path / "whole", save_strategy="epoch")
    callback = SAPCallback(2, **SETTINGS)
    training = trainer(tmp_path / "again", [callback, Interrupt()], save_strategy="epoch")
    with pytest.raises(KeyboardInterrupt):
        training.train()
    with pytest.raises(ValueError, match=r"must not be pruned yet .* call torch_sap\.remove\(model\) before train"):
        training.train(resume_from_checkpoint=True)
    for checkpoint in (True, str(tmp_path / "again" / "checkpoint-4")):  # the latter has more weights than the model
        remove(training.model)
        training.train(resume_from_checkpoint=checkpoint)
        assert_same((training.model, callback), expected)


@pytest.mark.slow
def test_resumes_from_a_folder_that_was_moved(tmp_path):
    expected = run(tmp_path / "a", rounds=2, save_strategy="epoch")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = str(tmp_path / "b" / "checkpoint-12")
    with pytest.raises(ValueError, match=r"or was moved \(name it in TrainingArguments"):
        run(tmp_path / "c", rounds=2, resume=moved, save_strategy="epoch")
    again = run(tmp_path / "c", rounds=2, resume=moved, save_strategy="epoch", resume_from_checkpoint=moved)
    assert_same(again, expected)
    run(tmp_path / "a", rounds=2, save_strategy="epoch", seed=5)  # another run's checkpoint of the same step
    with pytest.raises(ValueError, match=r"there is no torch_sap\.pt that belongs to it"):
        run(tmp_path / "a", rounds=2, resume=moved, save_strategy="epoch")


@pytest.mark.slow
def test_a_run_that_was_over_is_made_longer(tmp_path):
    expected = run(tmp_path / "long", rounds=4, save_strategy="epoch")
    run(tmp_path / "short", rounds=3, save_strategy="epoch")
    longer = run(tmp_path / "short", rounds=4, resume=tmp_path / "short" / "checkpoint-24", save_strategy="epoch")
    assert_same(longer, expected)


@pytest.mark.slow
def test_killed_in_the_second_round_and_resumed(tmp_path):
    expected = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    for step in (9, 13):
        folder = tmp_path / str(step)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(SCRIPT), str(folder), str(step)]
        killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resumed = run(folder, resume=True, save_strategy="steps", save_steps=3)
        assert_same(resumed, expected)
        resumed[0].save_pretrained(folder / "final")
        ids = data(1)[0]["input_ids"][None]
        loaded = type(resumed[0]).from_pretrained(folder / "final").eval()
        assert torch.equal(loaded(ids).logits, resumed[0].eval()(ids).logits)


@pytest.mark.slow
def test_two_processes(tmp_path):
    def training(*arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {**os.environ, **shared, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        workers = [
            subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.DEVNULL)
            for rank in ("0", "1")
        ]
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]

    training(tmp_path / "whole", 0)
    middle = checkpoints(tmp_path / "whole")[1]
    training(tmp_path / "again", 0, middle)
    last, other = (checkpoints(tmp_path / name)[-1] for name in ("whole", "again"))
    assert last.name == other.name
    weights = [load_file(folder / "model.safetensors") for folder in (last, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    records = [read(folder / FILE) for folder in (last, other)]
    assert all(torch.equal(mask, records[1]["masks"][key]) for key, mask in records[0]["masks"].items())
    assert any(not mask.all() for mask in records[0]["masks"].values())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_folder_loads_by_from_pretrained(tmp_path, make):
    callback = SAPCallback(2, **SETTINGS)
    training = trainer(tmp_path, [callback], model=make(), save_strategy="epoch")
    training.train()
    training.save_model(tmp_path / "final")
    model, ids = training.model.eval(), data(1)[0]["input_ids"][None]
    loaded, report = type(model).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    last = callback.history[-1]
    assert zeros_of(loaded) == last.total - last.remaining
    dense, pruned = (type(model).from_pretrained(tmp_path / f"checkpoint-{step}") for step in (8, 16))
    assert zeros_of(pruned) - zeros_of(dense) == callback.history[0].pruned_count
    assert torch.equal(remove(model)(ids).logits, loaded(ids).logits)


def test_the_best_model_is_loaded_as_it_was(tmp_path):
    callback = SAPCallback(2, **SETTINGS)
    settings = dict(save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    _, last = run(tmp_path / "last", eval_strategy="epoch")
    training = trainer(tmp_path, [callback], **settings)
    training.train()
    best = type(training.model).from_pretrained(training.state.best_model_checkpoint).eval()
    ids = data(1)[0]["input_ids"][None]
    assert torch.equal(training.model.eval()(ids).logits, best(ids).logits)
    assert training.evaluate()["eval_loss"] == training.state.best_metric
    assert callback.history[-1].pruned is None
    assert callback.history[-1].pqi == last.history[-1].pqi
    assert [found.remaining for found in callback.history] == [found.remaining for found in last.history]


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.table(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.slow
def test_a_module_that_is_no_model_of_transformers(tmp_path):
    expected = run(tmp_path, make=Plain, save_strategy="steps", save_steps=3)
    for path in checkpoints(tmp_path)[::3]:
        assert_same(run(tmp_path / "other", make=Plain, resume=path, save_strategy="steps", save_steps=3), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = llama()
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    def training(resume=None):
        made = SAPCallback(2, **SETTINGS)
        trained = trainer(tmp_path / "a", [made], model=make(), save_strategy="steps", save_steps=3)
        trained.train(resume_from_checkpoint=resume)
        return trained.model, made

    expected = training()
    assert_held(expected[0])
    for path in checkpoints(tmp_path / "a")[2::3]:
        assert_same(training(resume=path), expected)
    expected[0].save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    for (name, value), other in zip(loaded.named_parameters(), expected[0].parameters(), strict=True):
        assert "lora" not in name or torch.equal(value, other), name


@pytest.mark.slow
def test_compiled(tmp_path):
    settings = dict(torch_compile=True, torch_compile_backend="aot_eager", save_strategy="epoch")
    model, callback = run(tmp_path, rounds=2, epochs_per_round=1, **settings)
    assert_held(model)
    loaded = type(model).from_pretrained(checkpoints(tmp_path)[-1])
    assert zeros_of(loaded) == callback.history[-1].total - callback.history[-1].remaining > 0


def test_the_file_is_there_before_older_checkpoints_go(tmp_path, monkeypatch):
    rotate, seen = transformers.trainer.rotate_checkpoints, []

    def rotate_after_looking(**settings):
        seen.append([(path / FILE).exists() for path in checkpoints(tmp_path)])
        rotate(**settings)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate_after_looking)
    run(tmp_path, rounds=2, save_strategy="epoch", save_total_limit=1)
    assert seen == [[True], *3 * [[True, True]]]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-16"]


def test_a_trainer_that_does_not_log_its_end(tmp_path):
    class Silent(transformers.Trainer):
        def log(self, logs, *args, **kwargs):
            if "train_runtime" not in logs:
                super().log(logs, *args, **kwargs)

    _, callback = run(tmp_path, kind=Silent)
    assert [found.pruned is None for found in callback.history] == [False, False, True]


def test_data_without_a_length_need_rounds_of_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    of_epochs, of_steps = SAPCallback(1), SAPCallback(steps_per_round=3)
    trainings = [trainer(tmp_path, [each], max_steps=7) for each in (of_epochs, of_steps)]
    for training in trainings:
        training.train_dataset = Stream()
    with pytest.raises(ValueError, match="epochs_per_round needs a data set with a length; use steps_per_round"):
        trainings[0].train()
    trainings[1].train()
    assert len(of_steps.history) == 3


def test_a_checkpoint_that_a_later_callback_asks_for(tmp_path):
    class Ask(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            control.should_save = state.global_step == 11

    expected = run(tmp_path, others=[Ask()], save_strategy="no")
    (path,) = checkpoints(tmp_path)
    assert_same(run(tmp_path / "b", resume=path, save_strategy="no"), expected)


def test_callbacks_that_the_trainer_restores_itself(tmp_path):
    settings = dict(save_strategy="epoch", eval_strategy="epoch", metric_for_best_model="loss")
    expected = run(tmp_path, others=[EarlyStoppingCallback(100)], load_best_model_at_end=False, **settings)
    callbacks = [SAPCallback(2, **SETTINGS), EarlyStoppingCallback(100)]
    training = trainer(tmp_path / "b", callbacks, restore_callback_states_from_checkpoint=True, **settings)
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    (restored,) = [each for each in training.callback_handler.callbacks if isinstance(each, SAPCallback)]
    assert restored is not callbacks[0]
    assert_same((training.model, restored), expected)


def test_a_second_training_goes_on_with_the_round(tmp_path):
    callback = SAPCallback(2, **SETTINGS)
    training = trainer(tmp_path, [callback], epochs=3)  # a round and a half
    training.train()
    assert len(callback.history) == 2
    training.train()
    assert [found.pruned is None for found in callback.history] == [False, False, True]
    other = trainer(tmp_path, [callback], epochs=2)
    other.train()
    assert len(callback.history) == 1


def test_a_training_anew_after_an_interrupted_one_begins_a_round(tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 10 and len(callback.history) == 1:
                raise KeyboardInterrupt

    callback = SAPCallback(steps_per_round=8, **SETTINGS)
    training = trainer(tmp_path, [callback, Interrupt()], epochs=4)
    with pytest.raises(KeyboardInterrupt):
        training.train()
    training.callback_handler.callbacks.pop()
    training.train()
    assert [found.pruned is None for found in callback.history] == [False, False, True]


def test_a_training_of_one_round_says_that_nothing_is_pruned(tmp_path, caplog):
    with caplog.at_level("WARNING", "torch_sap"):
        run(tmp_path, rounds=1)
        assert "prunes nothing: 8 steps are no more than one round" in caplog.text
        caplog.clear()
        run(tmp_path, rounds=2)
    assert not caplog.text


def test_what_is_refused(tmp_path, monkeypatch):
    run(tmp_path / "a", rounds=2, save_strategy="epoch")
    with pytest.raises(ValueError, match="epochs_per_round: 1 here, 2 in the checkpoint"):
        run(tmp_path / "b", epochs_per_round=1, resume=tmp_path / "a" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"beta: 0\.9 here, 0\.5 in the state"):
        run(tmp_path / "b", callback=SAPCallback(2, p=1.0, q=2.0), resume=tmp_path / "a" / "checkpoint-4")
    (tmp_path / "a" / "checkpoint-8" / FILE).unlink()
    with pytest.raises(ValueError, match="it was written without the callback, or not to its end"):
        run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-8")

    class Sharded(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **given):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    training = trainer(tmp_path / "b", [Sharded(), SAPCallback(2)])
    with pytest.raises(ValueError, match="shards it by FSDP or DeepSpeed"):
        training.train()


@pytest.mark.parametrize(
    ("arguments", "error", "rule"),
    [
        ({}, ValueError, "a round must be given as epochs_per_round or as steps_per_round, got"),
        ({"epochs_per_round": 1, "steps_per_round": 1}, ValueError, "epochs_per_round=1, steps_per_round=1"),
        ({"epochs_per_round": 0}, ValueError, "epochs_per_round must be 1 or more, got epochs_per_round=0"),
        ({"steps_per_round": 1.5}, TypeError, "steps_per_round must be an int, got 1.5"),
        ({"steps_per_round": 5, "rewind": 5}, ValueError, "a number of steps from 1 to steps_per_round - 1 = 4"),
        ({"epochs_per_round": 2, "rewind": "start"}, ValueError, 'rewind must be "init", "none" or a number of epochs'),
        ({"epochs_per_round": 2, "scope": "row"}, ValueError, "scope must be one of"),
        ({"epochs_per_round": 2, "exclude": 3}, TypeError, "exclude must be a pattern"),
        ({"epochs_per_round": 2, "q": 0.1}, ValueError, "p must be smaller than q"),
    ],
)
def test_mistakes_are_refused(arguments, error, rule):
    with pytest.raises(error, match=rule):
        SAPCallback(**arguments)
