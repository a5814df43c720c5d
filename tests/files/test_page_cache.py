import errno
import io
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from checkpoints import weights, write

import torch_sap.files.checkpoint_reading as checkpoint_reading
import torch_sap.files.checkpoint_writing as checkpoint_writing
import torch_sap.files.page_cache as page_cache
from torch_sap.cli.scanning import scan_checkpoint
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.files.checkpoint_pruning import prune_checkpoint
from torch_sap.files.weights import open_checkpoint

RULE = Hyperparameters()


@pytest.fixture
def forgotten(monkeypatch):
    """Each file of which pages are given back, with how many bytes are."""
    found: dict[str, int] = {}

    def forget(file, offset, length):
        name = os.path.basename(file.name)
        found[name] = found.get(name, 0) + length

    monkeypatch.setattr(checkpoint_reading, "forget", forget)
    monkeypatch.setattr(checkpoint_writing, "forget", forget)
    monkeypatch.setattr(checkpoint_reading, "PIECE", 2**13)
    monkeypatch.setattr(checkpoint_writing, "UNDER_WAY", 2**14)
    return found


def test_what_is_too_large(monkeypatch):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not page_cache.is_too_large(memory // page_cache.SHARE)
    assert page_cache.is_too_large(memory // page_cache.SHARE + 1)
    monkeypatch.delattr(page_cache.os, "sysconf")
    assert not page_cache.is_too_large(memory)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_files_larger_than_memory_are_not_kept_in_it(tmp_path, monkeypatch, forgotten, scope):
    monkeypatch.delattr(page_cache.os, "O_DIRECT", raising=False)
    monkeypatch.delattr(page_cache.os, "RWF_NOWAIT", raising=False)  # the cache has a file of a test
    path, out = write(weights(), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    prune_checkpoint(path, out, scope, RULE)
    scan_checkpoint(path, RULE)
    size = path.stat().st_size
    assert forgotten == {".b.safetensors.part": size}, "a small file is only brought to the disk"
    forgotten.clear()
    monkeypatch.setattr(page_cache, "SHARE", 2**40)
    prune_checkpoint(path, tmp_path / "c.safetensors", scope, RULE)
    assert (tmp_path / "c.safetensors").read_bytes() == out.read_bytes()
    assert forgotten[".c.safetensors.part"] == 2 * size, "brought to the disk, and later given back"
    assert forgotten["a.safetensors"] > 0.95 * size
    forgotten.clear()
    scan_checkpoint(path, RULE)
    assert 0.95 * size < forgotten["a.safetensors"] < size


def open_with_any_blocks(path, mode):
    """What open_past_cache gives on a disk that takes what it is given."""
    return open(path, mode, buffering=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("opened", [page_cache.open_past_cache, open_with_any_blocks], ids=["this disk", "any disk"])
def test_whole_blocks_are_written_past_the_cache(tmp_path, monkeypatch, suffix, dtype, opened):
    written = []

    def write_all(file, offset, memory):
        if any(file is direct for direct in files):
            assert offset % page_cache.BLOCK == len(memory) % page_cache.BLOCK == 0
            assert memory.ctypes.data % page_cache.BLOCK == 0
            written.append(len(memory))
        original(file, offset, memory)

    def open_past_cache(path, mode):
        files.append(opened(path, mode))
        return files[-1]

    original, files = checkpoint_writing._write_all, []
    path, out = write(weights(dtype), tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
    prune_checkpoint(path, out, "layer", RULE)
    monkeypatch.setattr(page_cache, "SHARE", 2**40)
    monkeypatch.setattr(checkpoint_writing, "_write_all", write_all)
    monkeypatch.setattr(checkpoint_writing, "open_past_cache", open_past_cache)
    prune_checkpoint(path, tmp_path / f"c{suffix}", "layer", RULE)
    assert (tmp_path / f"c{suffix}").read_bytes() == out.read_bytes()
    if files[0] is not None:
        assert sum(written) > 0.8 * path.stat().st_size
        assert all(file.closed for file in files)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_disk_that_refuses_blocks(tmp_path, monkeypatch, code):
    class Refuses(io.FileIO):
        def write(self, *_):
            raise OSError(code, os.strerror(code))

    path, out = write(weights(), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    prune_checkpoint(path, out, "layer", RULE)
    monkeypatch.setattr(page_cache, "SHARE", 2**40)
    monkeypatch.setattr(checkpoint_writing, "open_past_cache", lambda path, mode: Refuses(path, mode))
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            prune_checkpoint(path, tmp_path / "c.safetensors", "layer", RULE)
        assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
        return
    prune_checkpoint(path, tmp_path / "c.safetensors", "layer", RULE)
    assert (tmp_path / "c.safetensors").read_bytes() == out.read_bytes()


@pytest.fixture
def read(monkeypatch):
    """Bytes that are read past the cache, and into it, of files that are too large and not in it."""
    monkeypatch.setattr(page_cache, "SHARE", 2**40)
    monkeypatch.setattr(checkpoint_reading, "is_cached", lambda path: False)
    monkeypatch.setattr(checkpoint_reading, "PIECE", 2**14)
    found = {"past": 0, "into": 0}

    def read_past_cache(path, offset, length, blocks):
        done = past(path, offset, length, blocks)
        found["past"] += length if done else 0
        return done

    def read_into(file, offset, memory, path):
        found["into"] += len(memory)
        into(file, offset, memory, path)

    past, into = checkpoint_reading.read_past_cache, checkpoint_reading.read_into
    monkeypatch.setattr(checkpoint_reading, "read_past_cache", read_past_cache)
    monkeypatch.setattr(checkpoint_reading, "read_into", read_into)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("opened", [page_cache.open_past_cache, open_with_any_blocks], ids=["this disk", "any disk"])
def test_weights_are_read_past_the_cache(tmp_path, monkeypatch, read, dtype, rows, opened):
    values = weights(dtype)
    path = write(values, tmp_path / "a.safetensors")
    with opened(path, "rb") or nullcontext() as file:
        works = file is not None
    monkeypatch.setattr(page_cache, "open_past_cache", opened)
    tensors = open_checkpoint(path).weights(())
    found = {}
    for piece in checkpoint_reading.pieces_of(tensors, rows=rows):
        assert piece.values.data_ptr() % dtype.itemsize == 0
        found.setdefault(piece.tensor.name, []).append(piece.values.reshape(-1))
    for name, pieces in found.items():
        assert torch.equal(torch.cat(pieces), values[name].reshape(-1)), name
    assert (read["past"] if works else read["into"]) >= sum(tensor.nbytes for tensor in tensors)


def test_numbers_that_lie_oddly_are_read_into_the_cache(tmp_path, read):
    values = {"a": torch.arange(3, dtype=torch.uint8), "b.weight": torch.randn(90, 80)}
    path = write(values, tmp_path / "a.pt")
    (tensor,) = open_checkpoint(path).weights(())
    odd = tmp_path / "odd.pt"
    odd.write_bytes(b"x" + path.read_bytes())
    tensor = replace(tensor, path=odd, offset=tensor.offset + 1)
    (piece,) = checkpoint_reading.pieces_of([tensor], size=2**20)
    assert torch.equal(piece.values.reshape(90, 80), values["b.weight"])
    assert read == {"past": 0, "into": tensor.nbytes}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_disk_that_does_not_give_blocks(tmp_path, monkeypatch, read, code):
    class Refuses(io.FileIO):
        def readinto(self, *_):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(page_cache, "open_past_cache", lambda path, mode: Refuses(path, mode))
    path = write(weights(), tmp_path / "a.safetensors")
    tensors = open_checkpoint(path).weights(())
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            list(checkpoint_reading.pieces_of(tensors))
        return
    assert sum(len(piece.memory) for piece in checkpoint_reading.pieces_of(tensors)) == read["into"] > 0


def test_a_file_that_ends_too_early(tmp_path, read):
    path = write(weights(), tmp_path / "a.safetensors")
    tensors = open_checkpoint(path).weights(())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="ends at byte"):
        list(checkpoint_reading.pieces_of(tensors))


def test_what_the_cache_has_is_read_from_it(tmp_path, monkeypatch):
    path = write(weights(), tmp_path / "a.safetensors")
    assert page_cache.is_cached(path) == hasattr(os, "RWF_NOWAIT")
    monkeypatch.setattr(page_cache, "SHARE", 2**40)
    monkeypatch.setattr(checkpoint_reading, "is_cached", lambda path: True)
    monkeypatch.setattr(checkpoint_reading, "read_past_cache", lambda *_: pytest.fail("the disk was asked"))
    monkeypatch.setattr(checkpoint_reading, "forget", lambda *_: pytest.fail("the cache was emptied"))
    scan_checkpoint(path, RULE)


def test_what_is_forgotten_can_be_read_again(tmp_path):
    path = tmp_path / "a"
    with open(path, "w+b") as file:
        file.write(bytes(range(256)) * 256)
        file.flush()
        page_cache.forget(file, 1000, 60000)
    assert path.read_bytes() == bytes(range(256)) * 256
