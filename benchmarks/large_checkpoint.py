"""Scan and prune a checkpoint that is large, and compare with what just reading it takes.

Makes a safetensors file of random weights in the shapes of a language model, reads it twice, and runs, each in a
process of its own, `torch-sap scan`, and `torch-sap prune` in each scope; all of it several times in turn. Of each it
takes the seconds (of the commands with Python's start and imports, and with writing, to the disk) and the peak of the
resident memory. The file is dropped from the page cache before each; of the reading it is dropped between the two
times too ("disk"), or not ("disk, then cache"), or it does not go through the cache at all ("past the cache").

    python benchmarks/large_checkpoint.py --gb 12 --out docs/results/large_checkpoint.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from speed import machine

from torch_sap.cli.main import main as torch_sap_main

TYPES = {"bfloat16": "BF16", "float32": "F32"}
PIECE = 2**24
SCOPES = ("global", "layer", "neuron")
COLUMNS = ("turn", "step", "GB", "dtype", "threads", "seconds", "speed_of_reading", "peak_MiB", "machine")

Row = dict[str, str | int | float]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; return the rows that it has written."""
    args = _parser().parse_args(argv)
    if args.child:
        _child(args.child, args.file, args.threads)
        return []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.file or Path(folder, "model.safetensors")
        if not path.exists():
            make(path, args.gb, args.dtype)
            print(f"made {path}", flush=True)
        rows: list[Row] = []
        for turn in range(args.first_turn, args.first_turn + args.turns):
            reading = None
            for step in args.steps:
                seconds, peak = _measure(step, path, args.threads)
                reading = reading or seconds
                row = (turn, step, round(path.stat().st_size / 1e9, 2), args.dtype, args.threads, round(seconds, 1))
                rows.append(dict(zip(COLUMNS, (*row, round(reading / seconds, 2), peak, machine("cpu")), strict=True)))
                print(*rows[-1].values(), flush=True)
    if args.out is not None:
        _save(rows, args.out, args.first_turn > 1)
    return rows


def _save(rows: Sequence[Row], out: Path, add: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a" if add else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not add:
            writer.writeheader()
        writer.writerows(rows)


def shapes(total: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a language model of 4096 channels with as many blocks as make up a number of entries."""
    left = total
    embedding = ("embed_tokens.weight", (32000, 4096)), ("lm_head.weight", (32000, 4096))
    block = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
    block |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096)}
    block |= {"mlp.down_proj": (4096, 11008)}
    for name, shape in embedding:
        yield name, shape
        left -= shape[0] * shape[1]
    number = 0
    while left > 0:
        yield f"layers.{number}.input_layernorm.weight", (4096,)
        for name, shape in block.items():
            yield f"layers.{number}.{name}.weight", shape
            left -= shape[0] * shape[1]
        number += 1


def make(path: Path, gb: float, dtype: str) -> None:
    """Write the file. Normal weights with a deviation of each tensor; the values are cut out of one pool of 2 ** 26."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    tensors = list(shapes(int(gb * 1e9) // kind.itemsize))
    header, offset = {}, 0
    for name, shape in tensors:
        length = int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    pool = torch.randn(2**26)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            scale, left = 0.01 + 0.03 * torch.rand(()), int(np.prod(shape))
            while left > 0:
                start = int(torch.randint(2**25, ()))
                values = (pool[start : start + min(left, 2**22)] * scale).to(kind)
                file.write(values.view(torch.uint8).numpy().data)
                left -= len(values)
        os.fsync(file.fileno())


def read(path: Path, flags: int = 0) -> None:
    """Read a file once, into the same memory again and again."""
    memory = mmap.mmap(-1, PIECE)
    with open(path, "rb", buffering=0, opener=lambda name, mode: os.open(name, mode | flags)) as file:
        while file.readinto(memory):
            pass


def drop_from_cache(path: Path) -> None:
    """Let the system forget what it holds of a file, whose content the disk has."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(step: str, path: Path, threads: int) -> tuple[float, int | str]:
    """Seconds of a step, and the peak of its memory in MiB; commands run in a process of their own."""
    drop_from_cache(path)
    start = time.perf_counter()
    if step.startswith("read twice"):
        flags = os.O_DIRECT if step == "read twice (past the cache)" else 0
        read(path, flags)
        if step == "read twice (disk)":
            drop_from_cache(path)
        read(path, flags)
        return time.perf_counter() - start, ""
    command = [sys.executable, __file__, "--child", step, "--file", str(path), "--threads", str(threads)]
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(command, stdout=output).returncode
        seconds = time.perf_counter() - start
        if code:
            raise SystemExit(f"{step} failed with {code}")
        output.seek(0)
        return seconds, round(float(output.read().splitlines()[-1]))


def _child(step: str, path: Path, threads: int) -> None:
    """Do a step; the last line printed is the peak of memory in MiB."""
    torch.set_num_threads(threads)
    if step == "scan":
        torch_sap_main(["scan", str(path), "--json"])
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            scope = step.split(", ")[1]
            code = torch_sap_main(["prune", str(path), "-o", f"{folder}/out.safetensors", "--scope", scope, "--json"])
            if code:
                sys.exit(code)
    # not ru_maxrss: a child begins with its parent's
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(int(peak) / 1024)


def _parser() -> argparse.ArgumentParser:
    readings = [f"read twice ({how})" for how in ("disk", "past the cache", "disk, then cache")]
    steps = [*readings, "scan", *(f"prune, {scope}" for scope in SCOPES)]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=12, help="size of the file in 10 ** 9 bytes")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--steps", nargs="+", choices=steps, default=steps, help="what to measure; speeds are of the first"
    )
    parser.add_argument("--turns", type=int, default=3, help="how often all of it is measured")
    parser.add_argument("--first-turn", type=int, default=1, help="from 2 on the turns are added to the CSV file")
    parser.add_argument("--folder", type=Path, help="where to make the files; more than twice the size must be free")
    parser.add_argument("--file", type=Path, help="a file to take, or to make and keep, instead")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
