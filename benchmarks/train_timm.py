"""Iterative SAP in a training script that is built as timm's train.py is, from timm's public factories.

The lines marked "added" are those that docs/guide-timm.md adds to train.py itself. Arguments have train.py's names: a
round is a cycle of the learning rate, `--epochs` epochs long, and there are `--lr-cycle-limit` of them. Without
arguments it trains timm's `test_resnet` on 10,000 images of FashionMNIST, three rounds of four epochs, on a CPU:

    python benchmarks/train_timm.py
    python benchmarks/train_timm.py --model resnet18 --train-num-samples 60000 --epochs 20 --device cuda

In the --output folder are, at the end: `summary.csv` (an epoch a line), `sap.csv` (a round a line), timm's checkpoints
and, of each round, `round-N.safetensors` (the model that was evaluated, zeros where pruned). `--resume` with a
checkpoint of that folder goes on from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import torch_sap
from torch_sap.records.round import Round

try:
    from timm import utils
    from timm.data import resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import create_model, load_checkpoint, resume_checkpoint
    from timm.optim import create_optimizer_v2, optimizer_kwargs
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs
    from timm.utils import CheckpointSaver, ModelEmaV3
except ImportError as error:
    raise SystemExit(f"{error}: the benchmarks need more packages, pip install -e '.[bench]'") from error

import data
from models import choose_device, save_weights, set_threads
from training import evaluate, seed_everything


def main(argv: Sequence[str] | None = None) -> torch_sap.History:
    """Run the command line; return the history that it has written."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except (AssertionError, FileNotFoundError, FloatingPointError, RuntimeError, ValueError) as error:
        raise SystemExit(f"train_timm: {error}") from error


def run(args: argparse.Namespace) -> torch_sap.History:
    """Build all parts in the order of timm's train.py, and train."""
    seed_everything(args.seed)
    dataset, model = build(args)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    sap = torch_sap.SAP(model, scope=args.scope, optimizer=optimizer)  # added: before all that copies the model
    start = 0
    if args.resume:
        start = resume_checkpoint(model, args.resume, optimizer)
        sap.load_state_dict(torch.load(Path(args.resume).with_name("sap.pt"), weights_only=True))  # added
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    if args.resume and ema is not None:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=args.output, recovery_dir=args.output)
    training = Training(args, dataset, model, optimizer, ema, out)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    scheduler.step(start)
    metrics: dict[str, float] = {}
    for epoch in range(start, epochs):
        if epoch > 0 and epoch % args.epochs == 0:  # added: a cycle is complete
            training.save_round(len(sap.history))
            print_round(sap.step(metrics))  # added
            if ema is not None:
                ema.set(model)  # added
        metrics = training.epoch(epoch)
        saver.save_checkpoint(epoch, metric=metrics["accuracy"])
        torch.save(sap.state_dict(), out / "sap.pt")  # added: beside the checkpoint
        scheduler.step(epoch + 1, metrics["accuracy"])
    training.save_round(len(sap.history))
    print_round(sap.record(metrics))  # added
    sap.history.to_csv(out / "sap.csv")  # added
    return sap.history


def build(args: argparse.Namespace) -> tuple[data.Dataset, nn.Module]:
    """Make the model, and the data set in the size that the model takes."""
    device = choose_device(args.device)
    dataset = data.load(args.data, args.data_dir)
    model = create_model(args.model, in_chans=dataset.in_chans, num_classes=dataset.num_classes)
    given = {"in_chans": dataset.in_chans, "img_size": args.img_size}
    config = resolve_data_config(given, model=model)
    dataset = dataset.resized(config["input_size"][-1])
    if isinstance(dataset.train, data.MemorySplit):
        chosen = slice(args.train_num_samples)
        few = replace(dataset.train, images=dataset.train.images[chosen], labels=dataset.train.labels[chosen])
        dataset = replace(dataset, train=few)
    set_threads(model, args.threads)
    return dataset.to(device), model.to(device)


@dataclass
class Training:
    """What train.py has in `main` and `train_one_epoch`: the parts, an epoch with them, and a line in the table."""

    args: argparse.Namespace
    dataset: data.Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    out: Path

    @property
    def evaluated(self) -> nn.Module:
        """The model that metrics are of: the average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train an epoch, evaluate, and write its line."""
        torch.manual_seed(self.args.seed + epoch)  # a resumed run sees the same batches
        rate = self.optimizer.param_groups[0]["lr"]
        loss = self._train(epoch)
        metrics = evaluate(self.evaluated, self.dataset.test)
        summary = self.out / "summary.csv"
        utils.update_summary(epoch, {"loss": loss}, metrics, str(summary), rate, write_header=not summary.exists())
        print(
            f"epoch {epoch:3}  rate {rate:.4f}  train loss {loss:.4f}  accuracy {metrics['accuracy']:.2%}", flush=True
        )
        return metrics

    def save_round(self, number: int) -> None:
        """Write the model that was evaluated last, zeros where pruned."""
        save_weights(self.evaluated, self.out / f"round-{number}.safetensors")

    def _train(self, epoch: int) -> float:
        loss_fn = LabelSmoothingCrossEntropy(self.args.smoothing) if self.args.smoothing else nn.CrossEntropyLoss()
        meter = utils.AverageMeter()
        updates = epoch * max(1, len(self.dataset.train) // self.args.batch_size)
        self.model.train()
        for images, labels in self.dataset.train.batches(self.args.batch_size, shuffle=True):
            self.optimizer.zero_grad()
            loss = loss_fn(self.model(images), labels)
            loss.backward()
            if self.args.clip_grad is not None:
                utils.dispatch_clip_grad(self.model.parameters(), self.args.clip_grad)
            self.optimizer.step()
            updates += 1
            if self.ema is not None:
                self.ema.update(self.model, step=updates)
            meter.update(loss.item(), len(labels))
        if not meter.avg < float("inf"):
            raise FloatingPointError(f"training diverged in epoch {epoch}: the loss is {meter.avg}; try a smaller --lr")
        return meter.avg


def print_round(found: Round) -> None:
    """Print a line."""
    print(f"round {found.number}: {found.density:.1%} of the weights, PQ Index {found.pqi:.4f}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="fashion-mnist", choices=data.NAMES, help="the images")
    add("--data-dir", type=Path, help="where they lie, or are downloaded to")
    add("--train-num-samples", type=int, default=10000, help="training images; all of them if there are fewer")
    add("--model", default="test_resnet", help="name of a model of timm")
    add("--img-size", type=int, default=28, help="pixels a side")
    add("--scope", default="layer", choices=("global", "layer", "neuron"), help="what one ratio is computed over")
    add("--opt", default="sgd", help="timm's name of the optimizer")
    add("--lr", type=float, default=0.1, help="learning rate at the start of each cycle")
    add("--momentum", type=float, default=0.9, help="of the optimizer")
    add("--weight-decay", type=float, default=2e-5, help="of the optimizer")
    add("--clip-grad", type=float, help="largest norm of the gradient")
    add("-b", "--batch-size", type=int, default=128, help="images a step")
    add("--sched", default="cosine", choices=("cosine", "tanh", "poly"), help="timm's name of the schedule")
    add("--epochs", type=int, default=4, help="epochs of a cycle, which is a round")
    add("--lr-cycle-limit", type=int, default=3, help="cycles: trainings, one more than prunings")
    add("--lr-cycle-decay", type=float, default=1.0, help="factor on the rate from cycle to cycle (train.py: 0.5)")
    add("--warmup-epochs", type=int, default=0, help="only the first cycle has them (train.py: 5)")
    add("--warmup-lr", type=float, default=1e-5, help="rate at the start of the warm-up")
    add("--min-lr", type=float, default=0.0, help="rate at the end of a cycle")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--model-ema", action="store_true", help="evaluate an exponential moving average of the weights")
    add("--model-ema-decay", type=float, default=0.98, help="of the average (train.py: 0.9998, for longer trainings)")
    add("--resume", default="", help="a checkpoint to go on from")
    add("--output", default="runs/train_timm", help="folder for the results")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=int, help="of the CPU (default: 1 for small models, else PyTorch's choice)")
    add("--seed", type=int, default=42, help="of the initial weights and the order of the images")
    return parser


if __name__ == "__main__":
    main()
