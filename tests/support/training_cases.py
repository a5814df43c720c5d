"""Cases of test_training_distributed.py, run in every process: timm models in DDP and FSDP2 against masking by hand."""

import torch
import torch.distributed as dist
from distributed_models import assert_same_model, assert_same_report, mine
from fully_sharded import fully_shard
from helpers import masked_by_hand, masks_of
from timm_training import Hand, assert_same_training, batches, loss_of, make, momentum, optim, plain_step, twins
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torch_sap


def own_part(step):
    """A step with the part of the batch that belongs to this process."""
    return lambda model, optimizer, inputs, hand: step(model, optimizer, mine(inputs), hand)


def data_parallel(kind, pruned, bucket_view=False):
    """DDP around the pruned and around the dense model, which is masked by hand: bitwise equal."""
    model, dense = twins(kind)
    if pruned == "before":
        torch_sap.layer_unstructured(model, eta_r=0.1)
        masked_by_hand(dense, masks_of(model))

    def wrap(model):
        return DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)

    assert_same_training(model, dense, own_part(plain_step), wrap=wrap)
    assert_the_same_everywhere(model)


def data_parallel_accumulates_and_clips(kind):
    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        first, second = inputs.chunk(2)
        with model.no_sync():
            loss_of(model, first).backward()
        loss = loss_of(model, second)
        loss.backward()
        hand.gradients()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        hand.weights()
        return loss.item(), norm.item()

    model, dense = twins(kind)
    assert_same_training(model, dense, own_part(step), wrap=DistributedDataParallel)
    assert_the_same_everywhere(model)


def rounds_in_data_parallel(kind):
    """SAP of the wrapped model: every process prunes the same, and the same as one process alone."""
    parallel, alone = DistributedDataParallel(make(kind).double()), make(kind).double()
    for each in (parallel, alone):
        each.eval()  # statistics of a part of the batch are others than those of all of it
    steppers = [torch_sap.SAP(each, eta_r=0.2) for each in (parallel, alone)]
    optimizers = [momentum(each) for each in (parallel, alone)]
    for seed in range(3):
        for inputs in batches(2, seed=seed):
            for each, optimizer, part in zip((parallel, alone), optimizers, (mine(inputs), inputs), strict=True):
                optimizer.zero_grad()
                (each(part.double()) - 1).square().mean().backward()
                optimizer.step()
        rounds = [stepper.step() for stepper in steppers]
        assert rounds[0].tensors_after == rounds[1].tensors_after
        ours, theirs = masks_of(parallel.module), masks_of(alone)
        assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())
    assert_the_same_everywhere(parallel.module)


def assert_the_same_everywhere(model):
    for name, value in model.state_dict().items():
        if (
            "running" in name or "num_batches" in name
        ):  # those of the first process count, and are sent before a forward
            continue
        everywhere = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, value.contiguous())
        assert all(torch.equal(value, other) for other in everywhere), name


def sharded(kind, order, checkpointing=False, optimizer="momentum"):
    """fully_shard of each block and of the model, against one process that prunes alike and one masked by hand."""
    many, one, dense = (make(kind).double().eval() for _ in range(3))
    if checkpointing:
        many.set_grad_checkpointing(True)
    if order == "shard, prune":
        shard(many)
        optimizers = [make_optimizer(each, optimizer) for each in (many, one, dense)]
        train((many, one, dense), optimizers, Hand(dense), seed=9)  # momentum from before the pruning
    for number in range(2):
        assert_same_report(*(torch_sap.layer_unstructured(each, eta_r=0.2) for each in (many, one)), rounding=1e-9)
        if number == 0 and order == "prune, shard":
            shard(many)
            optimizers = [make_optimizer(each, optimizer) for each in (many, one, dense)]
        masks = masks_of(one)
        masked_by_hand(dense, masks)
        train((many, one, dense), optimizers, Hand(dense, masks), seed=number)
        assert_same_model(many, one)
    torch_sap.remove(many)
    for (name, value), other in zip(many.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(value.full_tensor() if isinstance(value, DTensor) else value, other, msg=name)


def shard(model):
    for block in getattr(model, "blocks", None) or [model.layer1, model.layer2, model.layer3, model.layer4]:
        fully_shard(block)
    fully_shard(model)


def make_optimizer(model, name):
    return optim.create_optimizer_v2(model, name, lr=0.01, weight_decay=0.05)


def train(models, optimizers, hand, seed):
    """Two steps of a sharded model with its part of the batch, and of models of this process with all of it."""
    many, one, dense = models
    for inputs in batches(2, seed=seed):
        inputs = inputs.double()
        steps = [(many, mine(inputs), Hand(many)), (one, inputs, Hand(one)), (dense, inputs, hand)]
        losses = []
        for (model, part, by_hand), optimizer in zip(steps, optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(part) - 1).square().mean()
            loss.backward()
            by_hand.gradients()
            optimizer.step()
            by_hand.weights()
            losses.append(loss.detach())
        dist.all_reduce(losses[0])
        torch.testing.assert_close(losses[0] / dist.get_world_size(), losses[1])
        torch.testing.assert_close(losses[1], losses[2])


KINDS = ("resnet", "vit", "eva")
ORDERS = ("shard, prune", "prune, shard")
CASES = {
    **{f"DDP, pruned {when}, {kind}": (data_parallel, kind, when) for when in ("before", "after") for kind in KINDS},
    **{f"DDP, accumulation and clipping, {kind}": (data_parallel_accumulates_and_clips, kind) for kind in KINDS[1:]},
    **{f"DDP, rounds of SAP, {kind}": (rounds_in_data_parallel, kind) for kind in KINDS},
    **{
        f"FSDP2, {order}, {kind}": (sharded, kind, order)
        for order in ("shard, prune", "prune, shard")
        for kind in KINDS
    },
    "DDP, gradients in buckets, vit": (data_parallel, "vit", "after", True),
    "FSDP2, checkpointing, vit": (sharded, "vit", "prune, shard", True),
    "FSDP2, checkpointing, eva": (sharded, "eva", "shard, prune", True),
    "FSDP2, adamw, vit": (sharded, "vit", "shard, prune", False, "adamw"),
}
