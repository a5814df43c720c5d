import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # this package, and the modules that the benchmarks share

from zoo.main import main  # noqa: E402

raise SystemExit(main() > 0)
