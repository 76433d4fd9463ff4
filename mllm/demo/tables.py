"""Which tables are charts drawn from: scikit-learn's real ones and seeded random ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mllm.demo.charts import COLOURS, LABELS, MAX_VALUE, Chart

TABLES = ("iris", "wine", "breast_cancer", "diabetes")
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class RealTable:
    """One of scikit-learn's tables. features: ``(rows, columns)``; groups: class of every row (diabetes: third of the
    target)."""

    name: str
    features: np.ndarray
    names: tuple[str, ...]
    groups: np.ndarray
    group_names: tuple[str, ...]


@lru_cache(maxsize=1)
def real_tables() -> tuple[RealTable, ...]:
    """Iris, wine, breast cancer (Wisconsin) and diabetes, as shipped with scikit-learn."""
    from sklearn import datasets

    short = {
        "iris": ("Se", "Ve", "Vi"),
        "wine": ("W1", "W2", "W3"),
        "breast_cancer": ("Ma", "Be"),
        "diabetes": ("Lo", "Mi", "Hi"),
    }
    tables = []
    for name in TABLES:
        bunch: Any = getattr(datasets, f"load_{name}")()
        groups = (
            bunch.target
            if name != "diabetes"
            else np.searchsorted(np.quantile(bunch.target, [1 / 3, 2 / 3]), bunch.target)
        )
        names = tuple(str(n) for n in bunch.feature_names)
        tables.append(RealTable(name, np.asarray(bunch.data, float), names, np.asarray(groups, int), short[name]))
    return tuple(tables)


def draw_chart(rng: random.Random, split: str, *, real: float = 0.5) -> Chart:
    """A chart of the split: with probability ``real`` from a real table (columns pairs are either train's or test's),
    else from random numbers."""
    make = (_REAL if rng.random() < real else _RANDOM)[rng.choice(("bar", "line", "pie", "scatter"))]
    while True:
        chart = make(rng, split)
        if chart is not None:
            return chart


def _random_bar(rng: random.Random, split: str) -> Chart:
    count = rng.randint(2, 5)
    values = tuple(rng.randint(1, MAX_VALUE) for _ in range(count))
    return Chart("bar", _palette(rng, count), values, LABELS[:count])


def _random_line(rng: random.Random, split: str) -> Chart | None:
    count, points = rng.randint(1, 4), 5
    lines: list[tuple[int, ...]] = []
    for _ in range(count):
        start, end = rng.randint(1, MAX_VALUE), rng.randint(1, MAX_VALUE)
        path = np.linspace(start, end, points) + np.array([0, *(rng.uniform(-1, 1) for _ in range(points - 2)), 0])
        lines.append(tuple(int(v) for v in np.rint(path.clip(1, MAX_VALUE))))
    if len({line[-1] for line in lines}) < count:
        return None
    return Chart("line", _palette(rng, count), tuple(lines), LABELS[:points])


def _random_pie(rng: random.Random, split: str) -> Chart | None:
    count = rng.randint(2, 5)
    values = tuple(rng.randint(1, MAX_VALUE) for _ in range(count))
    return Chart("pie", _palette(rng, count), values, LABELS[:count]) if min(values) / sum(values) >= 0.06 else None


def _random_scatter(rng: random.Random, split: str) -> Chart:
    count = rng.randint(1, 4)
    sizes = rng.sample((4, 9, 14, 19), count)
    groups = []
    for size in sizes:
        slope = rng.choice((-1, 1)) * rng.uniform(0.5, 0.9)
        spread, middle = rng.uniform(0.3, 0.9), rng.uniform(4, 6) if count > 1 else 5
        x = [rng.uniform(0.3, 8.7) for _ in range(max(size, 10) if count == 1 else size)]
        groups.append(_points(x, [middle + slope * (v - 4.5) + rng.gauss(0, spread) for v in x]))
    return Chart("scatter", _palette(rng, count), tuple(groups))


def _real_bar(rng: random.Random, split: str) -> Chart | None:
    table, column, by, name = _columns(rng, split)
    if rng.random() < 0.4:
        names, rows = table.group_names, [table.groups == g for g in range(len(table.group_names))]
    else:
        rows = _bins(table.features[:, by], rng.randint(2, 5))
        names = LABELS[: len(rows)]
    statistic, measure = rng.choice((("mean", np.mean), ("median", np.median), ("spread", np.std), ("highest", np.max)))
    values = _scaled([float(measure(table.features[r, column])) if r.any() else 0.0 for r in rows])
    if values is None:
        return None
    return Chart("bar", _palette(rng, len(values)), values, tuple(names), f"{name}, {statistic}")


def _real_line(rng: random.Random, split: str) -> Chart | None:
    """Means of columns over fifths of another column."""
    table, column, by, name = _columns(rng, split)
    columns = [column]
    for _ in range(rng.choice((0, 0, 1, 2))):
        other, extra, _, _ = _columns(rng, split)
        if other is table and extra != by and extra not in columns and _held_out(table, extra, by) == (split == "test"):
            columns.append(extra)
    fifths = _bins(table.features[:, by], 5)
    if len(fifths) < 5:
        return None
    lines = [_stretched([float(table.features[rows, c].mean()) for rows in fifths]) for c in columns]
    if any(line is None for line in lines) or len({line[-1] for line in lines if line}) < len(lines):
        return None
    return Chart("line", _palette(rng, len(lines)), tuple(lines), LABELS[:5], f"{name}, mean by fifth")


def _real_pie(rng: random.Random, split: str) -> Chart | None:
    """How many rows of each class (or of each value band) lie in a part of a column's range."""
    table, column, by, name = _columns(rng, split)
    part = rng.choice(_bins(table.features[:, by], rng.randint(2, 4)))
    if rng.random() < 0.5:
        names, groups = table.group_names, [table.groups == g for g in range(len(table.group_names))]
    else:
        low, high = table.features[:, column].min(), table.features[:, column].max()
        edges = np.linspace(low, high, rng.randint(3, 6))
        band = np.clip(np.searchsorted(edges, table.features[:, column], side="right") - 1, 0, len(edges) - 2)
        groups = [band == b for b in range(len(edges) - 1)]
        names = LABELS[: len(groups)]
    values = tuple(int((part & rows).sum()) for rows in groups)
    kept = [(value, label) for value, label in zip(values, names) if value / max(sum(values), 1) >= 0.06]
    if len(kept) < 2:
        return None
    if names[0] == LABELS[0]:
        kept = [(value, label) for (value, _), label in zip(kept, LABELS)]
    return Chart(
        "pie", _palette(rng, len(kept)), tuple(v for v, _ in kept), tuple(n for _, n in kept), f"{name}, counts"
    )


def _real_scatter(rng: random.Random, split: str) -> Chart | None:
    table, column, by, name = _columns(rng, split)
    x, y = (_unit(table.features[:, c]) for c in (by, column))
    if rng.random() < 0.5:
        groups = [np.ones(len(x), bool)]
    else:
        groups = [table.groups == g for g in range(len(table.group_names))]
    sizes = rng.sample((5, 10, 15, 20), len(groups)) if len(groups) > 1 else [20]
    clouds = []
    for rows, size in zip(groups, sizes):
        chosen = rng.sample(np.flatnonzero(rows).tolist(), size)
        clouds.append(_points(9 * x[chosen], 0.5 + 8.5 * y[chosen]))
    return Chart("scatter", _palette(rng, len(clouds)), tuple(clouds), (), name)


_RANDOM: dict[str, Callable[[random.Random, str], Chart | None]] = {
    "bar": _random_bar,
    "line": _random_line,
    "pie": _random_pie,
    "scatter": _random_scatter,
}
_REAL: dict[str, Callable[[random.Random, str], Chart | None]] = {
    "bar": _real_bar,
    "line": _real_line,
    "pie": _real_pie,
    "scatter": _real_scatter,
}


def _palette(rng: random.Random, count: int) -> tuple[str, ...]:
    return tuple(rng.sample(list(COLOURS), count))


def _columns(rng: random.Random, split: str) -> tuple[RealTable, int, int, str]:
    """A table and a pair of its columns that belongs to the split."""
    while True:
        table = rng.choice(real_tables())
        column, by = rng.sample(range(len(table.names)), 2)
        if _held_out(table, column, by) == (split == "test"):
            return table, column, by, f"{table.name}: {table.names[column]} by {table.names[by]}"


def _held_out(table: RealTable, column: int, by: int) -> bool:
    """Whether a pair of columns is the test split's."""
    digest = hashlib.sha256(f"{table.name}/{table.names[column]}/{table.names[by]}".encode()).digest()
    return digest[0] < 256 * _TEST_SHARE


def _bins(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows by quantile of a column, empty bins left out."""
    edges = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    band = np.searchsorted(edges, values, side="right")
    return [rows for b in range(count) if (rows := band == b).any()]


def _scaled(values: list[float]) -> tuple[int, ...] | None:
    """Whole numbers 1 … 9 in proportion to the values; None when a value is not positive."""
    top = max(values)
    if min(values) <= 0:
        return None
    return tuple(max(1, round(MAX_VALUE * v / top)) for v in values)


def _stretched(values: list[float]) -> tuple[int, ...] | None:
    """Whole numbers 1 … 9 from the values' smallest to largest; None when they hardly differ."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), 1):
        return None
    return tuple(round(1 + (MAX_VALUE - 1) * (v - low) / (high - low)) for v in values)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = np.quantile(values, [0.02, 0.98])
    return ((values - low) / (high - low)).clip(0, 1)


def _points(x: Any, y: Any) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(a), 2), round(min(max(float(b), 0.2), 9.3), 2)) for a, b in zip(x, y))
