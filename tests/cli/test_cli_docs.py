"""The outputs on docs/command-line.md are what the commands print."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from torch_sap.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "command-line.md"
SETUP = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def printed(command, capsys):
    """What a command prints; of its pipe only "tail -n" is known. Both streams, as in a terminal."""
    words, _, pipe = command.partition(" | tail -n ")
    program, *argv = shlex.split(words)
    assert program == "torch-sap"
    main(argv)
    told = capsys.readouterr()
    lines = (told.out + told.err).splitlines()
    return [line.rstrip() for line in (lines[-int(pipe) :] if pipe else lines)]


def test_outputs_are_real(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    exec(SETUP.search(text).group(1), {})
    shutil.copytree(DOCS / "results" / "runs", tmp_path / "runs")
    shown = CONSOLE.findall(text)
    assert len(shown) >= 4
    for command, output in shown:
        assert printed(command, capsys) == output.splitlines(), command


def test_every_command_is_shown():
    commands = {command.split()[1] for command, _ in CONSOLE.findall(PAGE.read_text(encoding="utf-8"))}
    assert commands == {"scan", "prune", "report", "compare"}
