"""Which questions does a chart answer beyond doubt, and which of them are asked so that guessing does not pay?"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mllm.data.charts.chart import Chart, shown

KINDS = ("value", "extreme", "count", "colour", "comparison", "trend", "difference", "two_step", "unanswerable")
LABEL = "label"
"""Which bar is red? Of kind colour, whose reverse it is, unless one of the two is asked without the other."""
NOT_THERE = "not in the chart"
VISIBLE = 0.06
"""Least share of the value axis by which two marks must differ to be told apart."""


class Question(NamedTuple):
    """A question about one chart with its one right answer. template: the question without the chart's own words; answers
    are balanced within one template. values: the numbers that the answer follows from, where it takes more than one."""

    kind: str
    template: str
    text: str
    answer: str
    values: str = ""

    @property
    def worked(self) -> str:
        """The answer behind the values that it follows from."""
        return f"{self.values} = {self.answer}" if self.values else self.answer


def questions(chart: Chart, rng: random.Random, *, labels_apart: bool = False) -> dict[str, list[Question]]:
    """Every question that the chart answers beyond doubt, by kind. labels_apart: those of kind `LABEL` are not among the colours."""
    made = [_scatter(chart, rng)] if chart.type == "scatter" else [_marks(chart, rng), _lines(chart), _colours(chart)]
    found: dict[str, list[Question]] = {kind: [] for kind in (*KINDS, LABEL)}
    for question in itertools.chain(*made, _counts(chart), _in_vain(chart, rng)):
        if question.kind == LABEL and not labels_apart:
            question = question._replace(kind="colour")
        found[question.kind].append(question)
    return {kind: some for kind, some in found.items() if some}


def _ask(kind: str, template: str, answer: str, *words: str, values: str = "") -> Question:
    return Question(kind, template, template.format(*words), answer, values)


def _noun(chart: Chart) -> tuple[str, str]:
    return {
        "bar": ("bar", "bars"),
        "hbar": ("bar", "bars"),
        "pie": ("slice", "slices"),
        "line": ("line", "lines"),
        "scatter": ("group of points", "groups of points"),
    }[chart.type]


def _marks(chart: Chart, rng: random.Random) -> Iterator[Question]:
    """What bars, slices and points of lines say."""
    gap = VISIBLE * chart.span
    several = len(chart.series) > 1
    for series in chart.series:
        of = f" of {series.name}" if several else ""
        cells = list(zip(chart.categories, series.values))
        for label, value in cells:
            if abs(value) >= 0.1 * chart.span or chart.printed:
                if several:
                    yield _ask("value", "What is the value of {} for {}?", shown(value), series.name, label)
                else:
                    yield _ask("value", "What is the value for {}?", shown(value), label)
        yield from _extremes(cells, of, gap)
        yield from _pairs(cells, of, gap, chart, rng)
        if len(cells) > 3:
            value = rng.choice(series.values)
            above = sum(v > value for v in series.values)
            if all(v == value or abs(v - value) >= gap for v in series.values) and series.values.count(value) == 1:
                label = chart.categories[series.values.index(value)]
                yield _ask("two_step", "How many values{} are higher than that for {}?", str(above), of, label)


def _extremes(cells: list[tuple[str, float]], of: str, gap: float) -> Iterator[Question]:
    order = sorted(cells, key=lambda cell: cell[1])
    if len(order) < 3:
        return
    if order[-1][1] - order[-2][1] >= gap:
        yield _ask("extreme", "Which has the highest value{}?", order[-1][0], of)
        yield _ask("two_step", "What is the highest value{}?", shown(order[-1][1]), of)
        if order[-2][1] - order[-3][1] >= gap:
            yield _ask("two_step", "Which has the second highest value{}?", order[-2][0], of)
    if order[1][1] - order[0][1] >= gap:
        yield _ask("extreme", "Which has the lowest value{}?", order[0][0], of)


def _pairs(cells: list[tuple[str, float]], of: str, gap: float, chart: Chart, rng: random.Random) -> Iterator[Question]:
    for (a, left), (b, right) in rng.sample(pairs := list(itertools.permutations(cells, 2)), min(6, len(pairs))):
        if abs(left - right) >= gap:
            yes = "yes" if left > right else "no"
            both = f"{shown(left)}, {shown(right)}"
            yield _ask("comparison", "Is the value{} for {} higher than for {}?", yes, of, a, b, values=both)
        if left - right >= max(0.2 * chart.span, 2 * gap):
            difference = float(f"{left - right:.6g}")
            template, both = "By how much is the value{} for {} higher than for {}?", f"{shown(left)} - {shown(right)}"
            yield _ask("difference", template, shown(difference), of, a, b, values=both)


def _lines(chart: Chart) -> Iterator[Question]:
    if chart.type != "line":
        return
    gap = VISIBLE * chart.span
    for series in chart.series:
        change = series.values[-1] - series.values[0]
        if abs(change) >= 2.5 * gap:
            word = "rise" if change > 0 else "fall"
            if len(chart.series) == 1:
                yield _ask("trend", "Does the line rise or fall from its first to its last point?", word)
            else:
                yield _ask(
                    "trend", "Does the line of {} rise or fall from its first to its last point?", word, series.name
                )
    ends = sorted(chart.series, key=lambda s: s.values[-1])
    if len(ends) > 1 and ends[-1].values[-1] - ends[-2].values[-1] >= gap:
        yield _ask("extreme", "Which line ends highest?", ends[-1].name)
        yield _ask("two_step", "What colour is the line that ends highest?", ends[-1].colour)


def _colours(chart: Chart) -> Iterator[Question]:
    one, _ = _noun(chart)
    if chart.colours:
        for label, colour in zip(chart.categories, chart.colours):
            yield _ask("colour", "What colour is the {} of {}?", colour, one, label)
            yield _ask(LABEL, "Which {} is {}?", label, one, colour)
        order = sorted(zip(chart.series[0].values, chart.colours))
        if len(order) > 1 and order[-1][0] - order[-2][0] >= VISIBLE * chart.span:
            yield _ask("two_step", "What colour is the largest {}?", order[-1][1], one)
    elif len(chart.series) == 1:
        yield _ask(
            "colour", f"What colour {'is the line' if one == 'line' else 'are the bars'}?", chart.series[0].colour
        )
    else:
        for series in chart.series:
            yield _ask("colour", "What colour is {}?", series.colour, series.name)
            yield _ask(LABEL, "What is drawn in {}?", series.name, series.colour)


def _counts(chart: Chart) -> Iterator[Question]:
    _, many = _noun(chart)
    if chart.type in ("line", "scatter"):
        if len(chart.series) > 1:
            yield _ask("count", "How many {} are there?", str(len(chart.series)), many)
        if chart.type == "line":
            yield _ask("count", "How many points does each line have?", str(len(chart.categories)))
    else:
        number = len(chart.categories) * len(chart.series)
        yield _ask("count", "How many {} are there?", str(number), many)
        if len(chart.series) > 1:
            yield _ask("count", "How many colours of bars are there?", str(len(chart.series)))


def _scatter(chart: Chart, rng: random.Random) -> Iterator[Question]:
    several = len(chart.series) > 1
    for series in chart.series:
        if several:
            yield _ask("colour", "What colour are the points of {}?", series.colour, series.name)
            yield _ask(LABEL, "Which points are {}?", series.name, series.colour)
    if several:
        order = sorted(chart.series, key=lambda s: len(s.values))
        if len(order[-1].values) - len(order[-2].values) >= 4:
            yield _ask("extreme", "Which has the most points?", order[-1].name)
            yield _ask("two_step", "What colour are the most points?", order[-1].colour)
        for a, b in rng.sample(pairs := list(itertools.permutations(chart.series, 2)), min(3, len(pairs))):
            if abs(len(a.values) - len(b.values)) >= 4:
                yes = "yes" if len(a.values) > len(b.values) else "no"
                yield _ask("comparison", "Are there more points of {} than of {}?", yes, a.name, b.name)
        return
    yield _ask("colour", "What colour are the points?", chart.series[0].colour)
    x, y = np.array(chart.series[0].x), np.array(chart.series[0].values)
    correlation = float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
    if abs(correlation) >= 0.6:
        yield _ask("trend", "Do the points rise or fall from left to right?", "rise" if correlation > 0 else "fall")


def _in_vain(chart: Chart, rng: random.Random) -> Iterator[Question]:
    """The words of an answerable question about something that the chart does not show."""
    present = {*chart.categories, *(series.name for series in chart.series)}
    absent = [name for name in chart.others if name not in present]
    if not absent:
        return
    name, one = rng.choice(absent), _noun(chart)[0]
    if chart.type == "scatter":
        yield _ask("unanswerable", "What colour are the points of {}?", NOT_THERE, name)
        return
    yield _ask("unanswerable", "What is the value for {}?", NOT_THERE, name)
    if chart.colours:
        yield _ask("unanswerable", "What colour is the {} of {}?", NOT_THERE, one, name)
    label = rng.choice(chart.categories)
    yield _ask("unanswerable", "Is the value for {} higher than for {}?", NOT_THERE, label, name)


@dataclass
class Balance:
    """Chooses questions so that kinds keep their shares and, within a template, every answer comes up equally often."""

    shares: dict[str, float]
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    _levels: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """By template: how many of its answers came up so often. A look at every answer for every question took hours for 24,000 charts."""

    def choose(
        self, by_kind: dict[str, list[Question]], count: int, rng: random.Random, *, slack: int
    ) -> list[Question]:
        """Up to ``count`` questions, no two alike; one whose answer is already ``slack`` ahead of its template's rarest answer
        is left out."""
        chosen: list[Question] = []
        left = {kind: list(found) for kind, found in by_kind.items() if self.shares.get(kind, 0) > 0}
        while left and len(chosen) < count:
            kind = min(left, key=lambda k: (self.kinds[k] / self.shares[k], rng.random()))
            best = min(left[kind], key=lambda q: (self.answers[q.template, q.answer], rng.random()))
            left[kind].remove(best)
            if not left[kind]:
                del left[kind]
            if self._lead(best) > slack or any(best.text == q.text for q in chosen):
                continue
            self._count(best.template, best.answer)
            self.kinds[best.kind] += 1
            chosen.append(best)
        return chosen

    def _count(self, template: str, answer: str) -> None:
        before, levels = self.answers[template, answer], self._levels[template]
        self.answers[template, answer] = before + 1
        levels[before + 1] += 1
        if before:
            levels[before] -= 1
            if not levels[before]:
                del levels[before]

    def _lead(self, question: Question) -> int:
        """How far ahead the answer is; free for what is different in every chart (numbers, names)."""
        return self.answers[question.template, question.answer] - min(self._levels[question.template], default=0)
