"""Scan and prune large safetensors files, and compare with the time it takes to read them twice.

Writes a file of random weights in the shapes of a language model per type, reads it twice, and runs `torch-sap scan`
and `torch-sap prune` in each scope, each in its own process. The seconds of the commands include the start of Python
and, for `prune`, writing the output to the disk. The file is dropped from the page cache before each step and between
the two readings. The memory is anonymous resident memory (RssAnon); pages of files do not count.

    python benchmarks/large_checkpoint.py --gb 12 --out docs/results/large_checkpoint.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from speed import machine

from torch_sap.cli.main import main as torch_sap_main

TYPES = {"float32": "F32", "bfloat16": "BF16"}
STEPS = ("read twice", "scan", "prune, global", "prune, layer", "prune, neuron")
COLUMNS = ("turn", "step", "GB", "dtype", "threads", "seconds", "times_reading_twice", "anonymous_MiB", "machine")


def main(argv: Sequence[str] | None = None) -> list[tuple[object, ...]]:
    """Run the command line and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=12, help="size of the files in 10 ** 9 bytes")
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1, help="repetitions")
    parser.add_argument("--folder", type=Path, help="folder for the files; needs more than twice their size")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        run_step(args.child[0], Path(args.child[1]), args.threads)
        return []
    rows: list[tuple[object, ...]] = []
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder, "model.safetensors")
            make(path, args.gb, getattr(torch, dtype))
            for turn in range(1, args.turns + 1):
                reading = 0.0
                for step in STEPS:
                    seconds, memory = measure(step, path, args.threads)
                    reading = reading or seconds
                    size, ratio = round(path.stat().st_size / 1e9, 2), round(seconds / reading, 2)
                    rows.append(
                        (turn, step, size, dtype, args.threads, round(seconds, 1), ratio, memory, machine("cpu"))
                    )
                    print(*rows[-1], flush=True)
    if args.out is not None:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return rows


def shapes(total: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of a language model with blocks up to a total number of entries; small models are narrower."""
    width = 4096 if total > 2**30 else 512
    inner, table = 43 * width // 16, 32000 * width // 4096
    block = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 4, width)}
    block |= {"self_attn.v_proj": (width // 4, width), "self_attn.o_proj": (width, width)}
    block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    left = total - 2 * table * width
    yield from (("embed_tokens.weight", (table, width)), ("lm_head.weight", (table, width)))
    number = 0
    while left > 0:
        yield f"layers.{number}.input_layernorm.weight", (width,)
        for name, shape in block.items():
            yield f"layers.{number}.{name}.weight", shape
            left -= math.prod(shape)
        number += 1


def make(path: Path, gb: float, dtype: torch.dtype) -> None:
    """Write the file in pieces: normal weights from one pool, with a standard deviation per tensor."""
    torch.manual_seed(0)
    tensors = list(shapes(int(gb * 1e9) // dtype.itemsize))
    header, offset = {}, 0
    for name, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        kind = TYPES[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    pool = torch.randn(2**24)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            scale, left = 0.01 + 0.03 * torch.rand(()), math.prod(shape)
            while left > 0:
                start = int(torch.randint(2**23, ()))
                values = (pool[start : start + min(left, 2**22)] * scale).to(dtype)
                file.write(values.view(torch.uint8).numpy().data)
                left -= len(values)
        file.flush()
        os.fsync(file.fileno())


def measure(step: str, path: Path, threads: int) -> tuple[float, int | str]:
    """Seconds of a step, and the peak of a command's anonymous memory in MiB."""
    drop_from_cache(path)
    start = time.perf_counter()
    if step == "read twice":
        read(path)
        drop_from_cache(path)
        read(path)
        return time.perf_counter() - start, ""
    command = [sys.executable, __file__, "--child", step, str(path), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.splitlines()[-1])


def read(path: Path) -> None:
    """Read a file once, into one small buffer."""
    memory = bytearray(2**24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def drop_from_cache(path: Path) -> None:
    """Drop the pages of a file, which are on the disk, from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_step(step: str, path: Path, threads: int) -> None:
    """Run a command in this process, and print the peak of its anonymous memory in MiB as the last line."""
    torch.set_num_threads(threads)
    seen = [anonymous()]

    def watch() -> None:
        while True:
            seen.append(anonymous())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command, _, scope = step.partition(", ")
        options = ["-o", f"{folder}/out.safetensors", "--scope", scope] if scope else []
        code = torch_sap_main([command, str(path), *options, "--json"])
    print(max(seen))
    if code:
        sys.exit(code)


def anonymous() -> int:
    """Anonymous resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) // 2**10


if __name__ == "__main__":
    main()
