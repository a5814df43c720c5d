import errno
import os
import threading

import pytest
import torch
from checkpoints import shard, weights, write

import torch_sap.files.checkpoint_reading as checkpoint_reading
import torch_sap.files.checkpoint_writing as checkpoint_writing
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files.checkpoint_pruning import prune_checkpoint

RULE = Hyperparameters()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(checkpoint_reading, "PIECE", 2**13)
    monkeypatch.setattr(checkpoint_writing, "PIECE", 2**13)


@pytest.mark.parametrize("number", [0, 7, -1], ids=["first", "middle", "last"])
def test_an_error_in_writing_is_raised_and_leaves_nothing(tmp_path, monkeypatch, number):
    path, folder = write(weights(), tmp_path / "a.safetensors"), shard(weights(), tmp_path / "in")
    count = []
    original = checkpoint_writing._write
    monkeypatch.setattr(checkpoint_writing, "_write", lambda *arguments: count.append(1) or original(*arguments))
    prune_checkpoint(path, tmp_path / "whole.safetensors", "global", RULE)
    fatal, done = range(len(count))[number], []

    def full(*arguments):
        if len(done) == fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(arguments)
        original(*arguments)

    monkeypatch.setattr(checkpoint_writing, "_write", full)
    for source, out in ((path, tmp_path / "b.safetensors"), (folder, tmp_path / "out")):
        done.clear()
        with pytest.raises(OSError, match="No space left"):
            prune_checkpoint(source, out, "global", RULE)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "in", "whole.safetensors"]
    assert not [thread for thread in threading.enumerate() if "torch_sap_write" in thread.name]


def test_a_disk_that_is_too_full_is_noticed_before_the_work(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write(weights(), tmp_path / "a.safetensors")
    monkeypatch.setattr(checkpoint_writing.os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(checkpoint_writing.Output, "copy_all_but", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(OSError, match=rf"{path.stat().st_size} bytes are needed.*b\.safetensors") as caught:
        prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("lacks", ["posix_fallocate", "posix_fadvise"])
def test_a_system_that_cannot_be_advised(tmp_path, monkeypatch, lacks):
    path = write(weights(), tmp_path / "a.safetensors")
    prune_checkpoint(path, tmp_path / "b.safetensors", "layer", RULE)
    monkeypatch.delattr(checkpoint_writing.os, lacks, raising=False)
    prune_checkpoint(path, tmp_path / "c.safetensors", "layer", RULE)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_file_system_that_cannot_reserve(tmp_path, monkeypatch):
    def unknown(descriptor, offset, length):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    path = write(weights(), tmp_path / "a.safetensors")
    prune_checkpoint(path, tmp_path / "b.safetensors", "layer", RULE)
    monkeypatch.setattr(checkpoint_writing.os, "posix_fallocate", unknown, raising=False)
    prune_checkpoint(path, tmp_path / "c.safetensors", "layer", RULE)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_few_pieces_wait_for_a_slow_disk(tmp_path, monkeypatch):
    made, written, most = [], [], []
    monkeypatch.setattr(checkpoint_writing, "WAITING", 3 * 2**14)  # three pieces
    original, slow = checkpoint_writing.Output.write, threading.Event()

    def write_late(file, past_cache, offset, *_):
        slow.wait(0.002)
        written.append(offset)

    def give(self, source, offset, memory):
        original(self, source, offset, memory)
        made.append(offset)
        most.append(len(made) - len(written))

    path = write({"a.weight": torch.randn(500, 300)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(checkpoint_writing, "_write", write_late)
    monkeypatch.setattr(checkpoint_writing.Output, "write", give)
    prune_checkpoint(path, tmp_path / "b.safetensors", "global", RULE)
    assert written == made
    assert 1 < max(most) <= 4 < len(made)
