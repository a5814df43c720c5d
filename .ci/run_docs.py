"""Run the Python blocks of Markdown pages: those of a page in order, in one namespace, in an empty folder.

An HTML comment that begins with ``<!-- setup`` holds lines that are run but not shown. Relative links must lead to
a file.

    python .ci/run_docs.py README.md docs/*.md
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

BLOCK = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def run_page(page: Path) -> int:
    """Run one page and return how many blocks it had. Tracebacks point to the lines of the page."""
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": page.stem}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block.group(1), str(page), "exec"), namespace)
    return len(blocks)


def missing_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    return [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]


def main(arguments: list[str]) -> int:
    """Run the pages named on the command line; 1 if one has a link that leads nowhere."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    pages = [Path(argument).resolve() for argument in arguments]
    broken = [f"{page.name}: {link}" for page in pages for link in missing_links(page)]
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            start = time.perf_counter()
            blocks = run_page(page)
            print(f"{page.name}: {blocks} blocks, {time.perf_counter() - start:.1f} s", flush=True)
            os.chdir("/")
    for link in broken:
        print("link to nothing in", link)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
