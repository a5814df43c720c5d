"""The command line: what it prints, what it writes, and what it refuses."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import pruned_in_memory, shard, weights, write
from torch import nn

import torch_sap
from torch_sap.cli import commands, environment, tables
from torch_sap.cli import progress as progressing
from torch_sap.cli.main import main
from torch_sap.files.weights import open_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scan_of_a_file(folder, capsys):
    values = weights(torch.bfloat16)
    write(values, folder / "a.safetensors")
    assert main(["scan", "a.safetensors", "--json", "--csv", "a.csv", "--plot", "a.png", "--eta-r", "0.1"]) == 0
    scan = json.loads(capsys.readouterr().out)
    assert scan["source"] == "a.safetensors"
    assert scan["hyperparameters"]["eta_r"] == 0.1
    in_file_order = {one.name: values[one.name] for one in open_checkpoint("a.safetensors").weights()[0]}
    _, report = pruned_in_memory(in_file_order, "global", eta_r=0.1)
    assert scan["overall"]["remaining_global"] == report.density
    assert scan["random_weights"] is False
    left_out = {one["name"]: one["reason"] for one in scan["left_out"]}
    assert left_out == {one.name: one.reason for one in report.left_out} | {"position": 'no "weight" in its name'}
    with open("a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*(layer["name"] for layer in scan["layers"]), "overall"]
    assert float(rows[-1]["pqi"]) == scan["overall"]["pqi"]
    assert rows[0]["shape"] == "x".join(map(str, scan["layers"][0]["shape"]))
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_prune(folder, capsys, scope):
    values = weights()
    write(values, folder / "a.pt")
    command = ["prune", "a.pt", "-o", "b.pt", "--scope", scope, "--json", "--csv", "b.csv", "--gamma", "0.5"]
    assert main([*command, "--exclude", "stem"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected, report = pruned_in_memory(values, scope, gamma=0.5, exclude="stem")
    wanted = report.to_dict()
    left_out = [sorted(found.pop("left_out"), key=str) for found in (told, wanted)]
    assert left_out[0] == left_out[1] != []
    assert told == {"out": "b.pt", "copied": [], "not_copied": [], **wanted}
    found = torch.load("b.pt", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with open("b.csv", newline="") as file:
        assert int(list(csv.DictReader(file))[-1]["total"]) == report.total
    assert "b.pt exists" in refuse(capsys, *command)
    assert main([*command, "--overwrite"]) == 0


def test_prune_a_folder(folder, capsys):
    shard(weights(), folder / "in")
    for name in ("config.json", "pytorch_model.bin", "flax_model.msgpack"):
        (folder / "in" / name).write_text("{}")
    assert main(["prune", "in", "-o", "out", "--json"]) == 0
    printed = capsys.readouterr()
    left_out = ["flax_model.msgpack", "pytorch_model.bin"]
    told = json.loads(printed.out)
    assert (told["copied"], told["not_copied"]) == (["config.json"], left_out)
    assert printed.err == f"torch-sap: not copied, since they hold weights: {', '.join(left_out)}\n"
    assert sorted(os.listdir("out")) == sorted({*os.listdir("in")} - {*left_out})
    for file in (folder / "out").glob("model*"):
        file.unlink()
    assert "config.json exists" in refuse(capsys, "prune", "in", "-o", "out")


def test_negative_zeros_are_zeros(folder, capsys):
    values = {"a.weight": torch.randn(30, 40), "b.weight": torch.randn(20, 10).relu()}
    values["a.weight"][3:5] = 0
    scans = []
    for name, zero in (("a.pt", 0.0), ("b.pt", -0.0)):
        write({key: torch.where(value == 0, zero, value) for key, value in values.items()}, folder / name)
        assert main(["scan", name, "--json"]) == 0
        scans.append(json.loads(capsys.readouterr().out))
    assert scans[0]["layers"] == scans[1]["layers"]
    assert scans[1]["overall"]["dead_rows"] == 2


def make_run(path, seed=0, config=None, iterations=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    accuracy = iter([0.9, 0.91, 0.895, 0.7, 0.6])
    history = torch_sap.iterative_sap(
        model, lambda model: None, iterations=iterations, eval_fn=lambda model: {"accuracy": next(accuracy, 0.5)}
    )
    path.mkdir()
    history.to_json(path / "history.json")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return history


def test_report(folder, capsys):
    history = make_run(folder / "run")
    assert main(["report", "run", "--plot", "run.png", "--csv", "run.csv"]) == 0
    heading, head, _, *lines = capsys.readouterr().out.splitlines()
    assert heading == "run"
    assert head.split()[:2] == ["round", "remaining"]
    assert len(lines) == len(history)
    assert [line.split()[1] for line in lines] == [f"{round.remaining:,}" for round in history]
    assert (folder / "run.png").stat().st_size > 1000
    assert main(["report", "run/history.json", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["remaining"] for row in told["rounds"]] == [round.remaining for round in history]


def test_report_has_no_column_of_what_was_never_measured(folder, capsys):
    sap = torch_sap.SAP(torch.nn.Linear(8, 8))
    torch_sap.iterative_sap(sap, lambda model: {"loss": 0.5}, eval_fn=lambda model: {"accuracy": 0.9}, iterations=1)
    sap.history.to_json("history.json")
    assert main(["report", "history.json"]) == 0
    head = capsys.readouterr().out.splitlines()[1]
    assert head.endswith("  loss  accuracy  pruned accuracy")


def test_compare(folder, capsys):
    first = make_run(folder / "a", config={"scope": "global", "lr": 0.1, "seed": 3})
    make_run(folder / "b", seed=1, config={"scope": "global", "lr": 0.2, "seed": 3})
    assert main(["compare", "a", "b", "--plot", "runs.svg", "--json", "--tolerance", "0.02"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metric"] == "accuracy"
    assert [row["lr"] for row in told["runs"]] == [0.1, 0.2]
    assert "seed" not in told["runs"][0]
    values = [round.metrics["accuracy"] for round in first]
    row = told["runs"][0]
    assert (row["accuracy, first"], row["accuracy, best"]) == (values[0], max(values))
    within = [round.density for round in first if round.metrics["accuracy"] >= values[0] - 0.02]
    assert row["remaining within 0.02"] == min(within)
    assert (folder / "runs.svg").read_text().startswith("<?xml")


def refuse(capsys, *argv):
    """The one line on stderr of a command that fails."""
    assert main(list(argv)) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("torch-sap: ")
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err
    assert "[Errno" not in told.err
    return told.err


def test_unusable_inputs(folder, capsys):
    (folder / "text.safetensors").write_text("no tensors here, only words")
    (folder / "text.pt").write_text("no tensors here, only words")
    (folder / "empty").mkdir()
    write({"bias": torch.ones(3)}, folder / "bias.pt")
    write(weights() | {"bad.weight": torch.full((2, 2), float("nan"))}, folder / "nan.safetensors")
    assert "is not a safetensors file" in refuse(capsys, "scan", "text.safetensors")
    assert "or is damaged" in refuse(capsys, "scan", "text.pt")
    assert "holds no checkpoint" in refuse(capsys, "scan", "empty")
    assert "missing.pt does not exist" in refuse(capsys, "scan", "missing.pt")
    assert "no weight to prune" in refuse(capsys, "scan", "bias.pt")
    torch_sap.save_sparse(nn.Linear(3, 3), folder / "sparse.safetensors")
    for command in (["scan", "sparse.safetensors"], ["prune", "sparse.safetensors", "-o", "out.safetensors"]):
        assert "sparse.safetensors was written by save_sparse: load it with load_sparse" in refuse(capsys, *command)
    assert "must be finite, but bad.weight" in refuse(capsys, "scan", "nan.safetensors")
    assert "must be finite, but bad.weight" in refuse(capsys, "prune", "nan.safetensors", "-o", "out.safetensors")
    assert "exclude must match" in refuse(capsys, "scan", "nan.safetensors", "--exclude", "nothing")
    assert "key chooses in PyTorch's files" in refuse(capsys, "scan", "nan.safetensors", "--key", "ema")
    if importlib.util.find_spec("timm"):
        assert "similar: test_resnet" in refuse(capsys, "scan", "test_resnett")
        assert "similar: vit_tiny_patch16_224" in refuse(capsys, "scan", "vit_tiny")
    assert "./nothing/ does not exist" in refuse(capsys, "scan", "./nothing/")
    assert "missing.safetensors does not exist" in refuse(capsys, "prune", "missing.safetensors", "-o", "out")
    assert "--pretrained goes with the name" in refuse(capsys, "scan", "bias.pt", "--pretrained")
    assert "missing is not a run: there is no file missing" in refuse(capsys, "report", "missing")
    (folder / "history.json").write_text('{"format": 1, "rounds": [{}]}')
    assert "is not a history that torch_sap wrote" in refuse(capsys, "report", "history.json")
    (folder / "history.json").write_text('{"format": 1, "rounds": []}')
    assert "must have a round" in refuse(capsys, "report", ".")
    make_run(folder / "run")
    lacking = "run: metric 'loss' must be recorded in every round, but round 0 lacks it (round 0 has ['accuracy'])"
    for command in ("compare", "report"):
        assert lacking in refuse(capsys, command, "run", "--metric", "loss")
    (folder / "run" / "config.json").write_text("[1]")
    assert "must hold an object with settings" in refuse(capsys, "report", "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--csv", "no/scan.csv"], "--csv must name a file in a folder that exists, but no does not"),
        (["--csv", "."], "--csv must name a file, but . is a folder"),
        (["--plot", "scan.foo"], "--plot must end in one of .avif"),
        (["--plot", "no/scan.png"], "--plot must name a file in a folder that exists, but no does not"),
    ],
)
def test_outputs_are_checked_before_the_work(folder, capsys, monkeypatch, options, message):
    write(weights(), folder / "a.pt")
    monkeypatch.setattr(commands, "open_checkpoint", pytest.fail)
    assert message.removesuffix(".avif") in refuse(capsys, "scan", "a.pt", *options)
    assert sorted(os.listdir()) == ["a.pt"]


def test_the_output_of_prune_is_checked_before_the_work(folder, capsys, monkeypatch):
    write(weights(), folder / "a.pt")
    monkeypatch.setattr(commands, "prune_checkpoint", pytest.fail)
    message = "--out must name a file in a folder that exists, but no does not"
    assert message in refuse(capsys, "prune", "a.pt", "-o", "no/b.pt")


def test_the_table_is_printed_and_other_files_are_written_if_one_fails(folder, capsys, monkeypatch):
    def full(path, rows):
        raise OSError(28, "No space left on device", str(path))

    write(weights(), folder / "a.pt")
    monkeypatch.setattr(tables, "_write_csv", full)
    assert main(["scan", "a.pt", "--csv", "a.csv", "--plot", "a.png"]) == 1
    told = capsys.readouterr()
    assert told.err == "torch-sap: a.csv: No space left on device\n"
    assert "overall" in told.out
    assert (folder / "a.png").stat().st_size > 1000


def test_random_weights_are_said(folder, capsys):
    pytest.importorskip("timm")
    assert main(["scan", "test_resnet", "--seed", "3", "--plot", "a.svg"]) == 0
    assert capsys.readouterr().out.startswith("test_resnet with random weights (seed 3): remaining %")
    assert "test_resnet, random weights" in (folder / "a.svg").read_text()
    assert main(["scan", "test_resnet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["random_weights"] is True


def test_layers_of_safetensors_files_are_in_natural_order(folder, capsys):
    names = [f"blocks.{number}.weight" for number in (0, 1, 2, 10, 11)]
    write({name: torch.randn(6, 5) for name in names}, folder / "a.safetensors")
    write({name: torch.randn(6, 5) for name in reversed(names)}, folder / "a.pt")
    for file, order in (("a.safetensors", names), ("a.pt", names[::-1])):
        assert main(["scan", file, "--json"]) == 0
        assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == order
        assert main(["prune", file, "-o", f"b{file[1:]}", "--json"]) == 0
        assert [tensor["name"] for tensor in json.loads(capsys.readouterr().out)["tensors"]] == order


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_fits_the_terminal_and_splits_no_number(folder, capsys, monkeypatch, width):
    name = "encoder.layers.%d.self_attention.output_projection.weight"
    write({name % number: torch.randn(50, 40) for number in range(3)}, folder / "a.pt")
    command = ["scan", "a.pt", "--exclude", "encoder.layers.2"]
    assert main(command) == 0
    whole = capsys.readouterr().out.splitlines()
    assert whole[3].split()[0] == name % 0
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    first, second = (line for line in lines if "2,000" in line)
    assert first.split()[0] != second.split()[0]
    assert set(first.split()[1:]) <= set(whole[3].split())
    assert {"2,000", whole[3].split()[3]} <= set(first.split()), "weights and PQI are always shown"
    assert f"left out: {name % 2} (excluded)" in " ".join(lines)
    assert ("Too narrow for: " in " ".join(lines)) == (width == 60)


@pytest.mark.parametrize(
    ("names", "width", "expected"),
    [
        (["a.0.weight", "a.1.weight"], 10, ["a.0.weight", "a.1.weight"]),
        (["a.0.weight", "a.1.weight"], 9, ["a.0…", "a.1…"]),
        (["model.layers.0.q.weight", "model.layers.10.k.weight"], 9, ["…0.q…", "…10.k…"]),
        (["encoder.1.first_long", "encoder.1.second_long"], 12, ["…first_long", "…second_long"]),
        (["blocks.0.attention.proj", "blocks.1.attention.proj", "head"], 12, ["blocks.0…roj", "blocks.1…roj", "head"]),
        (["one_name_that_is_long.weight"], 12, ["one_n…weight"]),
    ],
)
def test_shortened_names_can_be_told_apart(names, width, expected):
    assert tables.all_shortened(names, width) == expected


def test_versions(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["torch_sap"], lines["torch"]) == (torch_sap.__version__, torch.__version__)
    assert set(environment.PACKAGES) < set(lines)
    assert "CPU" in lines["devices"]
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lines


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_a_reader_that_closes_the_pipe_is_no_error(folder):
    make_run(folder / "run")
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "torch_sap", "report", "run"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths})
    os.close(write_end)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_in_a_terminal_only(capsys, monkeypatch, is_terminal):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(progressing, "AFTER", 0.01)
    with progressing.progress("scanning a.safetensors", 100) as advance:
        advance(25)
        time.sleep(0.1)
        advance(50)
    with progressing.progress("pruning a.safetensors") as advance:
        time.sleep(0.1)
        advance(25, 50)
        time.sleep(0.1)
    told = capsys.readouterr()
    assert told.out == ""
    assert ("scanning a.safetensors:  25%" in told.err and "left" in told.err) == is_terminal
    assert ("pruning a.safetensors: 00:00" in told.err) == is_terminal
    assert ("pruning a.safetensors:  50%" in told.err) == is_terminal, "once the total is known"
    assert (told.err == "") != is_terminal


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["scan"], "MODEL"),
        (["scan", "a.pt", "--p", "x"], "invalid float value: 'x'"),
        (["scan", "a.pt", "--p", "2"], "p must be smaller than q, got p=2.0, q=1.0"),
        (["prune", "a.pt", "-o", "b.pt", "--beta", "1.5"], "beta must lie in [0, 1], got beta=1.5"),
        (["prune", "a.pt"], "-o/--out"),
        (["prune", "a.pt", "-o", "b.pt", "--scope", "row"], "invalid choice: 'row'"),
        (["report", "run", "--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("usage: torch-sap")


@pytest.mark.parametrize("command", [[], ["scan"], ["prune"], ["report"], ["compare"], ["env"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert "Exit codes:" in text
    assert "130" in text


@pytest.mark.parametrize(
    ("package", "argv", "extra"),
    [
        ("safetensors", ["scan", "a.safetensors"], "torch_sap[cli]"),
        ("timm", ["scan", "test_resnet"], "torch_sap[timm]"),
        ("matplotlib.figure", ["scan", "a.pt", "--plot", "a.png"], "torch_sap[plot]"),
    ],
)
def test_a_missing_package_is_named(folder, capsys, monkeypatch, package, argv, extra):
    write(weights(), folder / "a.pt")
    write(weights(), folder / "a.safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    assert extra in refuse(capsys, *argv)


def test_in_a_process_of_its_own(folder):
    write(weights(), folder / "a.pt")

    def call(line):
        command = f"{sys.executable} -m torch_sap {line}; echo ${{PIPESTATUS[0]}}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120)

    failed = call("prune b.pt -o c.pt")
    assert failed.stdout.split() == ["1"]
    assert failed.stderr.count("\n") == 1
    piped = call("scan a.pt --json | head -n 1")
    assert (piped.stdout.split(), piped.stderr) == (["{", "0"], "")
    piped = call("scan a.pt --json | true")  # the pipe is closed before the first line
    assert (piped.stdout.split(), piped.stderr) == (["0"], "")
    piped = call("scan --help | head -c 1")
    assert (piped.stdout.split(), piped.stderr) == (["u0"], "")


INTERRUPTED = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.parametrize("module", ["torch", "timm"])
def test_no_traceback_on_ctrl_c_even_while_loading(folder, module):
    """The module stands for PyTorch, or for a model that takes long to make."""
    (folder / f"{module}.py").write_text(INTERRUPTED)
    paths = os.pathsep.join([str(folder), str(Path(torch_sap.__file__).parents[1])])
    command = [sys.executable, "-m", "torch_sap", "scan", "test_resnet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "torch-sap: stopped\n")


PEAK = """
import sys, threading, time
from torch_sap.cli.main import main

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if "RssAnon" in line)) // 2**10

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.005)

seen = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
assert main(["scan", "a.safetensors", "--json", "--csv", "a.csv"]) == 0
assert main(["prune", "a.safetensors", "-o", "b.safetensors", "--scope", sys.argv[1], "--json"]) == 0
print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux with /proc")
@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_a_gigabyte_takes_little_memory(folder, scope):
    """Two tensors of half a gigabyte each; pages of the files do not count."""
    one = torch.randn(2**11, 2**12)
    whole = torch.cat([(one * scale).bfloat16() for scale in torch.rand(2**5) + 0.5])
    write({"a.weight": whole, "b.weight": whole.clone()}, folder / "a.safetensors")
    done = subprocess.run([sys.executable, "-c", PEAK, scope], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 400
