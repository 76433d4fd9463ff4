"""What does a small model read off charts of real tables, kind of question by kind? The README's picture, from the measured table.

    python benchmarks/real_charts_picture.py [benchmarks/results/real_charts_h200.txt] [docs/images/real_charts.svg]

Reads the table below the line that begins "By kind, all renderers" and draws the score of the text encoder alone with its interval beside
what is reached without the right picture (the best of gray, shuffled and prior), what both encoders and it reach after a third of the
rows, and what both reach after more steps. No figure is written here. CPU, a second.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
HEAD = "By kind, all renderers"


class Kind(NamedTuple):
    """A line of the table, in percent."""

    name: str
    count: int
    score: float
    low: float
    high: float
    floor: float
    both: float
    text: float
    longer: float


def kinds(text: str) -> list[Kind]:
    """The rows of the table ``name | n | score | low - high | gray g, shuffled s, prior p | both b, text t | longer l``.

    Raises `ValueError` where there is none.
    """
    after = text.partition(HEAD)[2].splitlines()[1:]
    found = []
    for line in after:
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 7:
            break
        low, high = map(float, cells[3].split(" - "))
        floor = max(map(float, re.findall(r"\d+\.\d+", cells[4])))
        alone = map(float, re.findall(r"\d+\.\d+", cells[5] + cells[6]))
        found.append(Kind(cells[0], int(cells[1]), float(cells[2]), low, high, floor, *alone))
    if not found:
        raise ValueError(f"no table below {HEAD!r}")
    return found


def draw(rows: list[Kind], path: Path) -> None:
    """The picture as SVG, letters as outlines, on white (it is shown as an image, by day and by night)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "real_charts", "font.size": 10})
    rows = [rows[0], *sorted(rows[1:], key=lambda row: row.floor - row.score)]
    figure, axes = plt.subplots(figsize=(7.2, 3.7), layout="constrained")
    places = list(range(len(rows), 0, -1))
    axes.barh(places, [row.score for row in rows], height=0.62, color=["#1f5fd6", *["#7da7ec"] * (len(rows) - 1)])
    reach = [[row.score - row.low for row in rows], [row.high - row.score for row in rows]]
    axes.errorbar(
        [row.score for row in rows], places, xerr=reach, fmt="none", ecolor="#1a1a1a", elinewidth=1, capsize=2
    )
    lines: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "#1a1a1a", "markeredgewidth": 0.8, "markersize": 6}
    axes.plot(
        [row.both for row in rows], places, marker="^", color="#f5b942", label="both encoders, 880 steps", **lines
    )
    axes.plot([row.text for row in rows], places, marker="o", color="#ffffff", label="text alone, 880 steps", **lines)
    longer = "both, 2,200 steps"
    axes.plot([row.longer for row in rows], places, marker="D", color="#1f5fd6", label=longer, **lines)
    floors = [row.floor for row in rows]
    without = "the most without the right picture"
    axes.plot(floors, places, "|", color="#d62728", markersize=15, markeredgewidth=2.5, label=without)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.set_yticks(places, [f"{row.name.replace('_', ' ')} ({row.count:,})" for row in rows])
    axes.set_xlim(0, 100)
    axes.set_xlabel("right, % (bar: text encoder alone, 1,736 steps of twice the rows, 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    source = given[0] if given else ROOT / "benchmarks/results/real_charts_h200.txt"
    target = given[1] if len(given) > 1 else ROOT / "docs/images/real_charts.svg"
    table = kinds(source.read_text(encoding="utf-8"))
    draw(table, target)
    print(f"{target}: {len(table)} bars from {source}")
