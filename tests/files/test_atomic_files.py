"""Several files take their places when all are complete; otherwise nothing changes."""

import os

import pytest

from torch_sap.files.atomic import replacing


def write(text, *paths):
    with replacing(*paths) as temporary:
        for path in temporary:
            with open(path, "w") as file:
                file.write(text)


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_files_are_written_and_replaced(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write("old", first)
    write("new", first, second)
    assert contents(tmp_path) == {"a": "new", "b": "new"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    write("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "folder") == {"a": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, step, error):
    write("old", tmp_path / "a", tmp_path / "b")

    def fail(*arguments):
        raise error(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(error):
        write("new", tmp_path / "a", tmp_path / "b")
    monkeypatch.undo()
    assert contents(tmp_path) == {"a": "old", "b": "old"}


def test_a_block_that_raises_leaves_what_was_there(tmp_path):
    def fail(path):
        with replacing(path):
            raise ValueError("no")

    write("old", tmp_path / "a")
    with pytest.raises(ValueError, match="no"):
        fail(tmp_path / "a")
    assert contents(tmp_path) == {"a": "old"}
    with pytest.raises(FileNotFoundError):
        write("new", tmp_path / "missing" / "a")


def test_leftovers_of_killed_processes_are_deleted_and_nothing_else(tmp_path):
    for name in ("a.7-0123abcd.tmp", "b.7-0123abcd.tmp", "a.tmp"):
        (tmp_path / name).touch()
    write("new", tmp_path / "a")
    assert sorted(contents(tmp_path)) == ["a", "a.tmp", "b.7-0123abcd.tmp"]


def test_files_that_may_not_be_written_again(tmp_path):
    with replacing(tmp_path / "a") as (temporary,):
        os.chmod(temporary, 0o444)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o444
