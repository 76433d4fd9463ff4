"""What could almost be said of a chart? Its transcript with facts exchanged: hard negatives for a contrastive stage."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from mllm.data.charts.chart import COLOURS, Chart, Series, rounded, shown, transcript

NUMBER = 4
"""Near misses of a chart, each with one more wrong fact than the one before."""


def near_misses(chart: Chart, rng: random.Random) -> list[tuple[str, float]]:
    """`NUMBER` transcripts of the same chart with 1, 2, … of its facts (a colour, a number) replaced by others; with each, the share of
    facts that still hold. It is what a cross-encoder's score estimates where nobody knows the truth (CPRD, arXiv 2407.07479); here it is
    known. Fewer than `NUMBER` where there are fewer facts."""
    facts = [("colour", k, -1) for k in range(len(chart.colours) or len(chart.series))]
    if chart.type != "scatter":
        facts += [("value", k, place) for k, series in enumerate(chart.series) for place in range(len(series.values))]
    rng.shuffle(facts)
    found: list[tuple[str, float]] = []
    for kind, which, place in facts[:NUMBER]:
        chart = _another_colour(chart, which, rng) if kind == "colour" else _another_value(chart, which, place, rng)
        found.append((transcript(chart), 1 - (len(found) + 1) / len(facts)))
    return found


def _another_colour(chart: Chart, which: int, rng: random.Random) -> Chart:
    now = chart.colours or tuple(series.colour for series in chart.series)
    colour = rng.choice([name for name in COLOURS if name != now[which]])
    if chart.colours:
        return replace(chart, colours=_with(now, which, colour))
    return replace(chart, series=_with(chart.series, which, replace(chart.series[which], colour=colour)))


def _another_value(chart: Chart, which: int, place: int, rng: random.Random) -> Chart:
    """Another number of the chart's size, which is written otherwise."""
    series: Series = chart.series[which]
    value, tries = series.values[place], 0
    while shown(value) == shown(series.values[place]):
        size = (chart.span or 1.0) * 2 ** (tries // 20)  # a span below the last digit that is written
        value, tries = rounded(series.values[place] + rng.choice((-1, 1)) * rng.uniform(0.2, 0.8) * size), tries + 1
    return replace(chart, series=_with(chart.series, which, replace(series, values=_with(series.values, place, value))))


def _with(items: tuple[Any, ...], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])
