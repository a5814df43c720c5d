"""How pictures of the pages look: as wide as a page, so that their text is about as large as the text around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

STYLE = ["default", "seaborn-v0_8-colorblind", {"font.size": 10, "lines.linewidth": 1.2}]
WIDTH, DPI = 7.5, 160
NARROW = 6.5  # of pictures with many panels: their text stays readable on a phone
COLORS = ("C0", "C1", "C2", "C3", "C5")  # Okabe and Ito's, without C4, a yellow that white paper swallows
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
WIDE = 40.0  # an axis that spans more than this factor has room for powers of ten only


def look(number: int) -> dict[str, Any]:
    """Color, line style and marker of the series of this number."""
    return {"color": COLORS[number], "linestyle": LINES[number], "marker": MARKERS[number], "markersize": 3}


def percent_log(axis: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis of percentages: 100 %, 10 %, 1 %, and what lies between on a short one."""
    lowest, highest = min(values), max(values)
    steps = (1,) if highest / lowest > WIDE else (1, 2, 5)
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_ticks([tick for tick in ticks if lowest / 1.1 <= tick <= highest * 1.1])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: f"{value:g} %")
