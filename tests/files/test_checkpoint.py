"""Checkpoint files: contents, refused files, failures while writing, and no code that runs."""

import os
import pickle
import stat
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import torch_sap
from torch_sap.files.checkpoint import FORMAT, as_plain, differences, read, write

STATE = {"weights": torch.arange(3000.0), "history": [1, 2.5, None, "x", True, 10**40], "nested": {"a": {0: (1, 2)}}}


def assert_read(path, state=STATE):
    found = read(path)
    assert found.pop("format") == FORMAT
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_round_trip_and_nothing_beside_the_file(tmp_path):
    path = tmp_path / "run.ckpt"
    write(path, {"weights": torch.zeros(2)})
    write(path, STATE)
    assert_read(path)
    assert os.listdir(tmp_path) == ["run.ckpt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, "as any other file"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, nn.Linear(2, 2)]}, r"\['a'\]\[1\] is a Linear"),
        ({"a": {"b": {1, 2}}}, r"\['a'\]\['b'\] is a set"),
        ({"a": torch.float32}, r"\['a'\] is a dtype"),
        ({"a": {(1, 2): 3}}, r"\['a'\] is a dict"),
        ({"a": print}, r"\['a'\] is a builtin_function_or_method"),
    ],
)
def test_values_that_are_not_plain_are_refused(value, place, tmp_path):
    write(tmp_path / "run.ckpt", STATE)
    with pytest.raises(TypeError, match=place):
        write(tmp_path / "run.ckpt", value)
    assert_read(tmp_path / "run.ckpt")


def test_parameters_and_buffers_are_tensors():
    found = as_plain({"a": nn.Parameter(torch.ones(2)), "b": nn.Buffer(torch.ones(2))})
    assert [type(value) for value in found.values()] == [torch.Tensor] * 2
    assert not found["a"].requires_grad


class Evil:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def malicious(path, kind, proof):
    """A file that would create the folder ``proof``."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(proof)))
    elif kind == "torch":
        torch.save({"format": FORMAT, "model": Evil(proof)}, path)
    elif kind == "old torch":
        torch.save({"format": FORMAT, "model": Evil(proof)}, path, _use_new_zipfile_serialization=False)
    else:  # a good checkpoint whose values were exchanged
        torch.save(STATE, path)
        with zipfile.ZipFile(path) as good:
            parts = {info.filename: good.read(info) for info in good.infolist()}
        with zipfile.ZipFile(path, "w") as bad:
            for name, data in parts.items():
                bad.writestr(name, pickle.dumps(Evil(proof), protocol=2) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "swapped"])
def test_a_malicious_file_runs_nothing(kind, tmp_path, monkeypatch):
    path, proof = tmp_path / "run.ckpt", tmp_path / "proof"
    malicious(path, kind, proof)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # it must not weaken this call
    with pytest.raises(ValueError, match=r"run\.ckpt.*Move it away") as caught:
        read(path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value), "no advice to load it nevertheless"
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists(), "the file is one that would have done it"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "run.ckpt"
    write(path, STATE)
    return path.read_bytes()


def test_truncated_files(good, tmp_path):
    path = tmp_path / "run.ckpt"
    lengths = [0, 1, 30, len(good) // 2, *range(len(good) - 300, len(good))]
    for length in lengths:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"run\.ckpt.*Move it away"):
            read(path)


def test_a_flipped_bit_is_found_or_without_effect(good, tmp_path):
    """Also one in a weight, which torch.load does not see."""
    path = tmp_path / "run.ckpt"
    seen = []
    start = good.index(STATE["weights"].numpy().tobytes()[:64])
    for place in [*range(0, len(good), 37), *range(start, start + 12000, 997)]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        try:
            assert_read(path)
        except ValueError:
            seen.append(place)
    assert set(range(start, start + 12000, 997)) <= set(seen)


@pytest.mark.parametrize(
    "rubbish", [b"", b"rubbish", bytes(5000), b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18)]
)
def test_rubbish(rubbish, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(rubbish)
    with pytest.raises(ValueError, match=r"run\.ckpt.*Move it away"):
        read(path)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, this torch_sap reads format {FORMAT}"),
        ({"format": "x"}, "format 'x'"),
        ({"0.weight": torch.zeros(2)}, "another file of PyTorch"),
        (torch.zeros(2), "another file of PyTorch"),
    ],
)
def test_other_files_of_pytorch(state, text, tmp_path):
    torch.save(state, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=text):
        read(tmp_path / "run.ckpt")


def test_a_file_without_checksums_is_never_written(tmp_path):
    """The user's own setting for checksums stays as it was."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("needs PyTorch 2.6 or newer, which has set_crc32_options")
    torch.serialization.set_crc32_options(False)
    try:
        write(tmp_path / "run.ckpt", STATE)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert_read(tmp_path / "run.ckpt")


FULL = """
import resource, sys, torch
from torch_sap.files.checkpoint import write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(sys.argv[1], {"weights": torch.zeros(int(sys.argv[2]))})
except OSError as error:
    print(type(error).__name__, error.errno, error)
"""


@pytest.mark.parametrize("entries", [30_000, 3_000_000])
def test_a_file_that_gets_too_large(entries, tmp_path):
    path = tmp_path / "run.ckpt"
    write(path, STATE)
    found = subprocess.run([sys.executable, "-c", FULL, path, str(entries)], capture_output=True, text=True, check=True)
    assert "File too large" in found.stdout
    assert "still there" in found.stdout
    assert "run.ckpt" in found.stdout
    assert not found.stderr
    assert os.listdir(tmp_path) == ["run.ckpt"]
    assert_read(path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder of one megabyte, where the machine allows to mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        yield None
    else:
        yield tmp_path
        subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """Of a mounted megabyte, or without the right to mount, of a device that is always full."""
    path = tmp_path / "run.ckpt"
    write(path, STATE)
    if small_disk is None:
        os.symlink("/dev/full", tmp_path / "full")
        with pytest.raises(OSError, match="No space"):
            torch_sap.files.checkpoint.save(STATE, tmp_path / "full")
    else:
        with pytest.raises(OSError, match=r"No space left on device.*still there"):
            write(path, {"weights": torch.zeros(300_000)})
    assert_read(path)
    assert [name for name in os.listdir(tmp_path) if name != "full"] == ["run.ckpt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_error_while_writing_leaves_the_old_file_alone(error, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    write(path, STATE)

    def fail(*arguments):
        raise error(5, "interrupted")

    monkeypatch.setattr(torch_sap.files.checkpoint._Writer, "write", fail)
    with pytest.raises(error):
        write(path, {"weights": torch.zeros(10)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["run.ckpt"]
    assert_read(path)


def test_folders_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be written"):
        write(tmp_path / "missing" / "run.ckpt", STATE)
    with pytest.raises(OSError, match="could not be written"):
        write(tmp_path, STATE)


def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(fsync.errno, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fsync.errno = 22
    write(tmp_path / "run.ckpt", STATE)
    fsync.errno = 5
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "run.ckpt", STATE)
    assert_read(tmp_path / "run.ckpt")


def test_differences_lists_all():
    here = {"p": 0.5, "scope": "layer", "model": {"a": "x", "b": "y"}, "same": 1}
    there = {"p": 0.2, "scope": "global", "model": {"a": "x", "c": "z"}, "same": 1}
    assert differences(here, there, "there").split("; ") == [
        "model.b: 'y' here, nothing there",
        "model.c: nothing here, 'z' there",
        "p: 0.5 here, 0.2 there",
        "scope: 'layer' here, 'global' there",
    ]
    assert differences(here, here, "there") == ""


def test_many_differences_are_cut_to_a_line():
    here = {"tensors": {f"layers.{number}.weight": [number] for number in range(600)}}
    found = differences(here, {}, "in the file")
    assert found.startswith("tensors.layers.0.weight: [0] here, nothing in the file; ")
    assert found.endswith("; and 595 more")
    assert len(found) < 400
