"""How pictures of the pages look: as wide as a page, so that their text is about as large as the text around them."""

from __future__ import annotations

STYLE = ["default", "seaborn-v0_8-colorblind", {"font.size": 10, "lines.linewidth": 1.2}]
WIDTH, DPI = 7.5, 160
COLORS = ("C0", "C1", "C2", "C3", "C5")  # Okabe and Ito's, without C4, a yellow that white paper swallows
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
