"""What keeps a model from naming labels that it remembers? Training charts whose names are other words, which only the picture tells."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from mllm.data.charts.chart import Chart
from mllm.data.charts.choosing import MAX_LABEL

_NUMBER = re.compile(r"[-+]?[\d.,]+")
_STARTS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "th",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_ENDS = ("", "", "l", "n", "nd", "r", "rt", "s", "ck", "m")


def words_of(charts: Iterable[Chart]) -> tuple[str, ...]:
    """The different words of two letters and more in the names that charts show, sorted."""
    names = {name for chart in charts for name in (*chart.categories, *chart.others, *(s.name for s in chart.series))}
    return tuple(sorted({word for name in names for word in re.findall(r"[^\W\d_]{2,}", name)}))


def relabelled(chart: Chart, words: tuple[str, ...], rng: random.Random) -> Chart:
    """The chart with other names on its categories and, where there are several, its series: one or two of ``words``, or made up of
    syllables. Names that are numbers (years) stay, and so does what stands on the axes."""
    several = len(chart.series) > 1
    names = [*chart.categories, *chart.others, *(series.name for series in chart.series if several)]
    taken = {name.lower() for name in names}
    other: dict[str, str] = {}
    for name in names:
        if name not in other and not _NUMBER.fullmatch(name):
            other[name] = _new(words, rng, taken)
    series = tuple(replace(s, name=_named(other, s.name)) for s in chart.series) if several else chart.series
    title = chart.title
    if several and all(s.name in title for s in chart.series):  # a title that lists them
        title = " and ".join(s.name for s in series)[:44]
    return replace(
        chart,
        categories=tuple(_named(other, name) for name in chart.categories),
        others=tuple(_named(other, name) for name in chart.others),
        series=series,
        title=title,
    )


def _named(other: Mapping[str, str], name: str) -> str:
    return other.get(name, name)


def _new(words: tuple[str, ...], rng: random.Random, taken: set[str]) -> str:
    """A name that is not taken yet, and takes it."""
    while True:
        known = [rng.choice(words) for _ in range(rng.choice((1, 1, 2)))] if words and rng.random() < 0.5 else []
        name = " ".join(known) or "".join(map(rng.choice, (_STARTS, _VOWELS, _ENDS) * rng.choice((1, 2, 2, 3))))
        name = rng.choice((str, str.title, str.title, str.upper))(name)
        if rng.random() < 0.15:
            name += f" {rng.randint(1, 99)}"
        if len(name) <= MAX_LABEL and name.lower() not in taken:
            taken.add(name.lower())
            return name
