"""How is a chart drawn fast, and which questions about it have exact answers?"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

COLOURS = {
    "red": "#e41a1c",
    "blue": "#1e62d8",
    "green": "#21a336",
    "orange": "#ff9310",
    "purple": "#7a1fa2",
    "pink": "#ff8ecb",
}
LABELS = ("A", "B", "C", "D", "E")
MAX_VALUE = 9
KINDS = ("colour", "extreme", "count", "comparison", "trend", "value")
ANSWER_TYPES = {
    "colour": "other",
    "extreme": "other",
    "count": "number",
    "comparison": "yes/no",
    "trend": "other",
    "value": "number",
}


@dataclass(frozen=True)
class Chart:
    """A table of whole numbers and how it is drawn.

    values: bar, pie: one number per mark; line: one list per mark, left to right; scatter: the marks' points as (x, y).
    Bars, lines and points lie in 0 … 9 (`MAX_VALUE`).
    """

    type: Literal["bar", "line", "pie", "scatter"]
    colours: tuple[str, ...]
    """One per mark, all different."""
    values: tuple[Any, ...]
    labels: tuple[str, ...] = ()
    """Bars' and slices' names, or the names under a line's points."""
    source: str = "random"
    """Where the numbers are from."""


class Question(NamedTuple):
    """A question about one chart with its one right answer."""

    kind: str
    template: str
    """The question without its colours and labels; answers are balanced within one template."""
    text: str
    answer: str


def questions(chart: Chart) -> dict[str, list[Question]]:
    """Every question that the chart answers beyond doubt, by kind. Ties and differences too small to see are not
    asked."""
    every = [*_counts(chart), *_colours(chart), *_comparisons(chart), *_trends(chart), *_values(chart)]
    return {kind: found for kind in KINDS if (found := [q for q in every if q.kind == kind])}


def caption(chart: Chart) -> str:
    """Everything a chart says, in one line of the questions' own words: marks from left to right, their colours and
    values."""
    marks = list(zip(chart.colours, chart.values))
    if chart.type == "bar":
        return "bars: " + ", ".join(f"{label} {colour} {value}" for label, (colour, value) in zip(chart.labels, marks))
    if chart.type == "pie":
        ranked = [colour for colour, _ in sorted(marks, key=lambda mark: -mark[1])]
        named = ", ".join(f"{label} {colour}" for label, (colour, _) in zip(chart.labels, marks))
        return f"slices: {named}; from large to small: {' '.join(ranked)}"
    if chart.type == "line":
        return "lines: " + ", ".join(f"{colour} {' '.join(str(v) for v in values)}" for colour, values in marks)
    return "points: " + ", ".join(f"{colour} {len(points)}" for colour, points in marks)


@dataclass
class Balance:
    """Chooses questions so that every answer of a template, and every kind at its share, comes up equally often."""

    shares: dict[str, float]
    answers: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)

    def choose(
        self, by_kind: dict[str, list[Question]], count: int, rng: random.Random, slack: int | None = None
    ) -> list[Question]:
        """Up to ``count`` questions of different kinds. slack: skip a question whose answer would be so far ahead of
        its template's rarest seen answer."""
        chosen: list[Question] = []
        order = sorted(by_kind, key=lambda kind: (self.kinds[kind] / self.shares[kind], rng.random()))
        for kind in order:
            if len(chosen) == count:
                break
            best = min(by_kind[kind], key=lambda q: (self.answers[q.template, q.answer], rng.random()))
            if slack is not None and self._lead(best) > slack:
                continue
            self.answers[best.template, best.answer] += 1
            self.kinds[kind] += 1
            chosen.append(best)
        return chosen

    def _lead(self, question: Question) -> int:
        rivals = [count for (template, _), count in self.answers.items() if template == question.template]
        return self.answers[question.template, question.answer] - min(rivals, default=0)


_MARKS = {"bar": ("bar", "bars"), "line": ("line", "lines"), "pie": ("slice", "slices"), "scatter": ("group", "groups")}


def _counts(chart: Chart) -> list[Question]:
    text = (
        "How many colours of points are there?"
        if chart.type == "scatter"
        else f"How many {_MARKS[chart.type][1]} are there?"
    )
    return [Question("count", text, text, str(len(chart.colours)))]


def _colours(chart: Chart) -> list[Question]:
    """Colour of a named mark, and colour of the largest and smallest."""
    one, _ = _MARKS[chart.type]
    found = []
    if chart.type in ("bar", "pie"):
        for label, colour in zip(chart.labels, chart.colours):
            found.append(Question("colour", f"label {one}", f"What colour is the {one} named {label}?", colour))
    elif len(chart.colours) == 1:
        text = "What colour is the line?" if chart.type == "line" else "What colour are the points?"
        found.append(Question("colour", text, text, chart.colours[0]))
    sizes, gap = _sizes(chart)
    if len(sizes) < 2:
        return found
    order = np.argsort(sizes)
    texts = {
        "bar": ("Which colour is the tallest bar?", "Which colour is the shortest bar?"),
        "line": ("Which colour ends highest?", "Which colour ends lowest?"),
        "pie": ("Which colour is the largest slice?", "Which colour is the smallest slice?"),
        "scatter": ("Which colour has the most points?", "Which colour has the fewest points?"),
    }[chart.type]
    if sizes[order[-1]] - sizes[order[-2]] >= gap:
        found.append(Question("extreme", texts[0], texts[0], chart.colours[order[-1]]))
    if sizes[order[1]] - sizes[order[0]] >= gap:
        found.append(Question("extreme", texts[1], texts[1], chart.colours[order[0]]))
    return found


def _comparisons(chart: Chart) -> list[Question]:
    wording = {
        "bar": "Is the {} bar taller than the {} bar?",
        "line": "Does the {} line end above the {} line?",
        "pie": "Is the {} slice larger than the {} slice?",
        "scatter": "Are there more {} points than {} points?",
    }[chart.type]
    sizes, gap = _sizes(chart)
    found = []
    for a, b in itertools.permutations(range(len(sizes)), 2):
        if abs(sizes[a] - sizes[b]) >= gap:
            text = wording.format(chart.colours[a], chart.colours[b])
            found.append(Question("comparison", wording, text, "yes" if sizes[a] > sizes[b] else "no"))
    return found


def _trends(chart: Chart) -> list[Question]:
    found = []
    if chart.type == "line":
        for colour, heights in zip(chart.colours, chart.values):
            change = heights[-1] - heights[0]
            if abs(change) >= 3 and _agrees(heights, change):
                text = f"Does the {colour} line rise or fall?"
                found.append(Question("trend", "line trend", text, "rise" if change > 0 else "fall"))
    elif chart.type == "scatter" and len(chart.values) == 1:
        x, y = np.array(chart.values[0], float).T
        correlation = float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
        if abs(correlation) >= 0.6:
            text = "Do the points rise or fall?"
            found.append(Question("trend", text, text, "rise" if correlation > 0 else "fall"))
    return found


def _values(chart: Chart) -> list[Question]:
    if chart.type == "bar":
        return [
            Question("value", "bar value", f"What is the value of the {colour} bar?", str(value))
            for colour, value in zip(chart.colours, chart.values)
        ]
    if chart.type == "line":
        return [
            Question("value", "line value", f"What is the last value of the {colour} line?", str(heights[-1]))
            for colour, heights in zip(chart.colours, chart.values)
        ]
    return []


def _sizes(chart: Chart) -> tuple[list[float], float]:
    """What marks are compared by, and the least difference that can be seen."""
    if chart.type == "line":
        return [heights[-1] for heights in chart.values], 1
    if chart.type == "scatter":
        return [len(points) for points in chart.values], 4
    if chart.type == "pie":
        total = sum(chart.values)
        return [value / total for value in chart.values], 0.08
    return list(chart.values), 1


def _agrees(heights: Sequence[int], change: int) -> bool:
    """No step against the trend is larger than 2, and none are in the majority."""
    steps = np.diff(heights) * (1 if change > 0 else -1)
    return steps.min() >= -2 and (steps < 0).sum() * 2 < len(steps)


class Renderer:
    """Draws charts of ``size`` × ``size`` pixels with matplotlib's Agg. Axes, grid and numbers are drawn once and kept
    as a background; per chart only its marks are."""

    def __init__(self, size: int = 112):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.size = size
        dots = 100
        self._point = 72 / dots * size / 112  # one pixel of a 112-pixel chart, in points
        figure = Figure(figsize=(size / dots, size / dots), dpi=dots, facecolor="white")
        self.canvas = FigureCanvasAgg(figure)
        axes = self.axes = figure.add_axes((0.12, 0.13, 0.86, 0.84))
        axes.set_xlim(0, 10)
        axes.set_ylim(0, MAX_VALUE + 0.6)
        axes.set_xticks([])
        axes.set_yticks([3, 6, 9])
        axes.set_yticks(range(1, MAX_VALUE + 1), minor=True)
        axes.grid(axis="y", which="minor", color="#e3e3e3", linewidth=0.5 * self._point)
        axes.grid(axis="y", which="major", color="#9a9a9a", linewidth=0.8 * self._point)
        axes.tick_params(axis="y", which="both", length=0, pad=1.5 * self._point, labelsize=11 * self._point)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_linewidth(1.0 * self._point)
        self.canvas.draw()
        self._grid = self.canvas.copy_from_bbox(figure.bbox)
        self.disc = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.disc.set_axis_off()
        self.disc.set_xlim(-1.3, 1.3)
        self.disc.set_ylim(-1.3, 1.3)
        axes.set_visible(False)
        self.canvas.draw()
        self._blank = self.canvas.copy_from_bbox(figure.bbox)
        axes.set_visible(True)

    def draw(self, chart: Chart) -> np.ndarray:
        """RGB pixels ``(size, size, 3)`` uint8."""
        axes = self.disc if chart.type == "pie" else self.axes
        self.canvas.restore_region(self._blank if chart.type == "pie" else self._grid)
        artists = {"bar": self._bars, "line": self._lines, "pie": self._slices, "scatter": self._points}[chart.type](
            chart
        )
        for artist in artists:
            axes.draw_artist(artist)
            artist.remove()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def _bars(self, chart: Chart) -> list[Any]:
        from matplotlib.patches import Rectangle

        pitch = 10 / len(chart.values)
        artists: list[Any] = []
        for place, (value, colour, label) in enumerate(zip(chart.values, chart.colours, chart.labels)):
            left = (place + 0.15) * pitch
            artists.append(
                self.axes.add_patch(Rectangle((left, 0), 0.7 * pitch, value, color=COLOURS[colour], linewidth=0))
            )
            artists.append(self._text(self.axes, (place + 0.5) * pitch, -0.75, label))
        return artists

    def _lines(self, chart: Chart) -> list[Any]:
        from matplotlib.lines import Line2D

        x = np.linspace(0.6, 9.4, len(chart.values[0]))
        artists: list[Any] = []
        for heights, colour in zip(chart.values, chart.colours):
            line = Line2D(
                x,
                heights,
                color=COLOURS[colour],
                linewidth=3.2 * self._point,
                marker="o",
                markersize=5.5 * self._point,
                markeredgewidth=0,
            )
            artists.append(self.axes.add_line(line))
        return artists + [self._text(self.axes, at, -0.75, label) for at, label in zip(x, chart.labels)]

    def _slices(self, chart: Chart) -> list[Any]:
        from matplotlib.patches import Wedge

        artists: list[Any] = []
        edges = 90 - 360 * np.cumsum([0, *chart.values]) / sum(chart.values)
        for begin, end, colour, label in zip(edges[:-1], edges[1:], chart.colours, chart.labels):
            wedge = Wedge(
                (0, 0), 1, end, begin, facecolor=COLOURS[colour], edgecolor="white", linewidth=1.2 * self._point
            )
            artists.append(self.disc.add_patch(wedge))
            angle = np.deg2rad((begin + end) / 2)
            artists.append(self._text(self.disc, 1.14 * np.cos(angle), 1.14 * np.sin(angle), label))
        return artists

    def _points(self, chart: Chart) -> list[Any]:
        from matplotlib.lines import Line2D

        artists: list[Any] = []
        for points, colour in zip(chart.values, chart.colours):
            x, y = np.array(points, float).T
            dots = Line2D(
                0.5 + x,
                y,
                color=COLOURS[colour],
                linestyle="",
                marker="o",
                markersize=6.5 * self._point,
                markeredgewidth=0,
            )
            artists.append(self.axes.add_line(dots))
        return artists

    def _text(self, axes: Any, x: float, y: float, text: str) -> Any:
        return axes.text(x, y, text, fontsize=11 * self._point, ha="center", va="center", clip_on=False)
