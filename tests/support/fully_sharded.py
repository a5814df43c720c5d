"""FSDP2, or what stands for it in PyTorch 2.5, whose own runs on GPUs only."""

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:

    def fully_shard(*arguments, **keywords):
        raise NotImplementedError(MISSING)

    MixedPrecisionPolicy = fully_shard

__all__ = ["MISSING", "MixedPrecisionPolicy", "fully_shard"]

MISSING = "this PyTorch has no FSDP2 for CPUs"
