"""Models, batches and steps on a GPU, and when the host waits for it: shared by test_cuda and test_cuda_training."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
}


@contextmanager
def waits():
    """The warnings of PyTorch about operations for which the host waits."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found[:] = [each for each in found if "synchronizing CUDA operation" in str(each.message)]


def resnet():
    torch.manual_seed(5)
    return timm.create_model("resnet18", num_classes=10)


def vit():
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=10, img_size=32)


def batch(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((8, 3, 32, 32), generator=generator).cuda(), (torch.arange(8) % 10).cuda()


def step(model, optimizer, of_batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(of_batch[0]), of_batch[1]).backward()
    optimizer.step()
