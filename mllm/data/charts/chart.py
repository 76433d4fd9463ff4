"""What is a chart, whoever draws it: labels, colours and the numbers that stand in it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

COLOURS = {
    "red": "#d62728",
    "blue": "#1f5fd6",
    "green": "#2a9d3a",
    "orange": "#ff8c1a",
    "purple": "#7b2fa8",
    "brown": "#7f4f24",
    "pink": "#f27bc4",
    "gray": "#7d7d7d",
}
"""Name → sRGB: what a question calls it and what every renderer draws."""
ChartType = Literal["bar", "hbar", "line", "scatter", "pie"]
DIGITS = 3
"""Significant digits of every number in a chart and in an answer."""


@dataclass(frozen=True)
class Series:
    """Numbers that are drawn in one colour. values: one per category; x: a scatter's horizontal places, else empty."""

    name: str
    colour: str
    values: tuple[float, ...]
    x: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One chart. categories: names of bars or slices, or the places under a line's points; empty for a scatter. colours: one
    per category where every bar or slice has its own, else empty. printed: each number stands beside its mark."""

    type: ChartType
    table: str
    title: str
    x_label: str
    y_label: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    colours: tuple[str, ...] = ()
    printed: bool = False
    others: tuple[str, ...] = ()
    """Labels of the same table that this chart leaves out: what may be asked for in vain."""

    @property
    def span(self) -> float:
        """Length of the value axis: from 0 where bars stand on it."""
        values = [value for series in self.series for value in series.values]
        low = min(values) if self.type in ("line", "scatter") else min(0.0, *values)
        return max(values) - low


def rounded(value: float) -> float:
    """``value`` with `DIGITS` significant digits."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def shown(value: float) -> str:
    """A rounded number as charts print it and answers say it: no exponent, no trailing zeros."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def transcript(chart: Chart) -> str:
    """Everything a chart says, in one line."""
    kinds = {"bar": "bars", "hbar": "horizontal bars", "line": "lines", "scatter": "points", "pie": "slices"}
    head = f"{kinds[chart.type]}; {chart.title}; "
    if chart.type == "scatter":
        return head + ", ".join(f"{series.name} {series.colour}" for series in chart.series)
    if chart.colours or len(chart.series) == 1:
        (series,) = chart.series
        names = chart.colours or ("",) * len(chart.categories)
        lead = "" if chart.colours else f"{series.colour}: "
        cells = (
            f"{label} {colour} {shown(value)}".replace("  ", " ")
            for label, colour, value in zip(chart.categories, names, series.values)
        )
        return head + lead + ", ".join(cells)
    rows = (
        f"{series.name} {series.colour}: "
        + ", ".join(f"{label} {shown(value)}" for label, value in zip(chart.categories, series.values))
        for series in chart.series
    )
    return head + "; ".join(rows)
