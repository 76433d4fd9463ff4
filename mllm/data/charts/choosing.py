"""Which charts can be drawn from a table, and why can none?"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm.data.charts.chart import COLOURS, Chart, Series, rounded

MAX_MARKS, MAX_SERIES, MAX_POINTS = 8, 4, 40
MAX_LABEL = 18
MAX_SCATTERS = 2
"""Charts of a table that can only be drawn as points: those answer few questions."""
MAX_ROWS = 20_000
_YEAR = re.compile(r"^(year|yr|date|time|decade|season)s?$", re.I)
_SIGNS = "‐‑–—‘’‚“”„†‡•…‰′″‹›€−"
"""What may stand beyond Latin-1 and is no letter: by some renderer others (emoji, dingbats, Arabic digits) come out as an empty box."""
_WRITTEN = re.compile(r"[-+]?[€£]?\d[\d,. ]*[%€£]?")
_SCALES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


@dataclass
class Columns:
    """What a table's columns can be used for. reasons: why the others are not."""

    values: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    years: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def usable_columns(frame: Any, max_rows: int = MAX_ROWS) -> tuple[Columns, str | None]:
    """(what the columns are good for, why the table cannot be drawn at all or None)."""
    found = Columns()
    if len(frame) < 2:
        return found, "fewer than two rows"
    if len(frame) > max_rows:
        return found, f"more than {max_rows} rows"
    for column in frame.columns:
        reason = _place(frame, column, found)
        if reason is not None:
            found.reasons[reason] += 1
    if not found.values and not found.groups:
        if any(all(map(_WRITTEN.fullmatch, frame[key].dropna().astype(str).str.strip())) for key in found.keys):
            found.reasons["numbers written as text (1,200 or 12%)"] += 1
        return found, "no column of numbers and none of groups: " + (", ".join(sorted(found.reasons)) or "labels alone")
    if not (found.keys or found.groups or found.years or len(found.values) > 1):
        return found, ": ".join(
            ["numbers without labels", *([", ".join(sorted(found.reasons))] if found.reasons else [])]
        )
    return found, None


def _place(frame: Any, column: Any, found: Columns) -> str | None:
    """Put a column where it is of use; the reason where it is of none."""
    import pandas as pd

    name, cells = str(column), frame[column]
    if not isinstance(cells, pd.Series):
        return "two columns of one name"
    if not _readable(name) or len(name) > 2 * MAX_LABEL:
        return "a name that is too long or in letters or signs that the renderers lack"
    if pd.api.types.is_datetime64_any_dtype(cells) or pd.api.types.is_timedelta64_dtype(cells):
        return "dates"
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        if pd.api.types.is_complex_dtype(cells):
            return "complex numbers"
        return _place_numbers(name, cells, found)
    return _place_labels(name, cells, found)


def _place_numbers(name: str, cells: Any, found: Columns) -> str | None:
    numbers = np.asarray(cells.dropna(), float)
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers) < 2:
        return "numbers that are missing"
    distinct = np.unique(numbers)
    if name.lower() in ("rownames", "unnamed: 0", "id") and len(distinct) == len(numbers):
        return "row numbers"
    if _YEAR.match(name) and len(distinct) >= 3 and distinct.min() > 1000 and distinct.max() < 2101:
        found.years.append(name)
        return None
    if len(distinct) <= 3:
        return "numbers that are codes"
    if abs(distinct).max() >= 1e12 or abs(distinct).max() < 0.01:
        return "numbers too large or too small to label"
    found.values.append(name)
    return None


def _place_labels(name: str, cells: Any, found: Columns) -> str | None:
    kinds = {type(value) for value in cells.dropna().head(50)}
    if kinds - {str, bool, np.bool_}:
        return "mixed types"
    labels = cells.dropna().astype(str).str.strip()
    distinct = labels.unique()
    if len(distinct) < 2:
        return "one label"
    if not (all(map(_readable, distinct[:200])) and all(map(_in_fonts, distinct[200:]))):
        return "labels in letters or signs that the renderers lack"
    if max(map(len, distinct[:200])) > MAX_LABEL or min(map(len, distinct[:200])) == 0:
        return "labels too long"
    if _are_dates(distinct):
        return "dates"
    if len(distinct) == len(cells) and len(distinct) >= 3:
        found.keys.append(name)
    elif len(distinct) <= MAX_MARKS:
        found.groups.append(name)
    else:
        return f"more than {MAX_MARKS} groups"
    return None


def _readable(text: str) -> bool:
    """Not empty, `_in_fonts`, and without signs that renderers take for markup."""
    return bool(text.strip()) and _in_fonts(text) and not set(text) & set("$\\{}^\"'`<>|\n\t\r@~#")


def _in_fonts(text: str) -> bool:
    """Latin, Greek or Cyrillic letters, and signs that every font has."""
    return text.isascii() or all(map(_in_font, set(text)))


def _in_font(character: str) -> bool:
    if character.isalpha():
        return unicodedata.name(character, "").startswith(("LATIN", "GREEK", "CYRILLIC"))
    return ord(character) < 0x100 or character in _SIGNS


def _are_dates(labels: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\d{1,4}[-/.]\d{1,2}([-/.]\d{1,4})?(\s.*)?", label) for label in labels[:20])


def draw_charts(frame: Any, table: str, columns: Columns, count: int, rng: random.Random) -> list[Chart]:
    """Up to ``count`` different charts of a table, as even over the kinds as the columns allow."""
    makers: list[Callable[[], Chart | None]] = []
    context = (frame, table, columns, rng)
    if columns.keys and columns.values:
        makers += [lambda: _by_key(*context), lambda: _by_key(*context)]
    if columns.groups:
        makers += [lambda: _by_group(*context), lambda: _by_group(*context)]
    if columns.years and columns.values:
        makers += [lambda: _over_years(*context), lambda: _over_years(*context), lambda: _over_years(*context)]
    if len(columns.values) > 1 and len(frame) >= 8:
        if not makers:
            count = min(count, MAX_SCATTERS)
        makers.append(lambda: _points(*context))
    charts: dict[tuple[Any, ...], Chart] = {}
    for _ in range(2 * count):
        if len(charts) == count:
            break
        made = rng.choice(makers)() if makers else None
        if made is not None:
            charts.setdefault((made.title, made.categories, made.type, made.series[0].values), made)
    return list(charts.values())


def _label(name: str) -> str:
    """A column's name for people."""
    return " ".join(re.sub(r"[_.]+", " ", name).split()) or name


def _finish(
    kind: str, table: str, title: str, x_label: str, y_label: str, categories: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]], rng: random.Random, others: Sequence[str] = (),
) -> Chart | None:  # fmt: skip
    """A chart of these numbers, scaled to what an axis can show; None where they cannot be told apart in a picture."""
    numbers = np.array([values for _, values in series], float)
    if not np.isfinite(numbers).all() or not numbers.size:
        return None
    largest = float(abs(numbers).max())
    for size, word in _SCALES:
        if largest >= 100 * size or (size > 1e3 and largest >= size):
            numbers, y_label = numbers / size, f"{y_label} ({word})"
            break
    if kind in ("bar", "hbar", "pie") and (numbers < 0).any():
        return None
    values = [tuple(rounded(float(v)) for v in row) for row in numbers]
    flat = [v for row in values for v in row]
    if len(set(flat)) < 2 or max(map(abs, flat)) < 0.05 or len(set(categories)) != len(categories):
        return None
    if kind != "line" and sum(v == 0 for v in flat) * 2 > len(flat):
        return None
    names = list(COLOURS)
    rng.shuffle(names)
    single = len(values) == 1
    own = kind == "pie" or (single and kind in ("bar", "hbar") and rng.random() < 0.5)
    made = tuple(
        Series(name, names[0] if own or single else names[place], row)
        for place, ((name, _), row) in enumerate(zip(series, values))
    )
    return Chart(
        kind, table, title[:44], x_label[:32], y_label[:40], tuple(categories), made,  # type: ignore[arg-type]
        colours=tuple(names[: len(categories)]) if own else (),
        printed=len(flat) <= 10 and rng.random() < 0.45,
        others=tuple(dict.fromkeys(o for o in others if o not in categories))[:20],
    )  # fmt: skip


def _pick(rng: random.Random, pool: Sequence[Any], low: int, high: int) -> list[Any]:
    """Between ``low`` and ``high`` of the pool, in its order."""
    count = rng.randint(min(low, len(pool)), min(high, len(pool)))
    return [pool[k] for k in sorted(rng.sample(range(len(pool)), count))]


def _by_key(frame: Any, table: str, columns: Columns, rng: random.Random) -> Chart | None:
    """One bar or slice per named row."""
    key, values = rng.choice(columns.keys), _alike(frame, columns.values, rng)
    rows = frame[[key, *values]].dropna()
    if len(rows) < 3:
        return None
    labels = [str(v).strip() for v in rows[key]]
    chosen = _pick(rng, range(len(labels)), 3, MAX_MARKS if len(values) == 1 else 5)
    kind = rng.choice(["bar", "hbar", "bar", "pie"] if len(values) == 1 and len(chosen) <= 6 else ["bar", "hbar"])
    series = [(_label(value), [float(rows[value].iloc[k]) for k in chosen]) for value in values]
    what = _label(values[0]) if len(values) == 1 else "value"
    title = f"{what} by {_label(key)}" if len(values) == 1 else f"{' and '.join(name for name, _ in series)}"
    return _finish(kind, table, title, _label(key), what, [labels[k] for k in chosen], series, rng, labels)


def _alike(frame: Any, values: Sequence[str], rng: random.Random) -> list[str]:
    """One column of numbers, or (one time in three) two or three whose sizes are alike."""
    first = rng.choice(values)
    if rng.random() < 0.67:
        return [first]
    size = float(abs(frame[first].astype(float)).median() or 1)
    others = [
        v for v in values if v != first and 0.2 < float(abs(frame[v].astype(float)).median() or 0) / (size or 1) < 5
    ]
    labels = {_label(first)}
    near = [v for v in others if _label(v) not in labels and len(v) <= MAX_LABEL]
    return [first, *_pick(rng, near, 1, 2)] if near and len(first) <= MAX_LABEL else [first]


def _by_group(frame: Any, table: str, columns: Columns, rng: random.Random) -> Chart | None:
    """Rows counted, or a column's mean, per group; sometimes per two groupings at once."""
    group = rng.choice(columns.groups)
    labels = frame[group].astype(object).where(frame[group].notna())
    counted = not columns.values or rng.random() < 0.35
    value = None if counted else rng.choice(columns.values)
    what = "number of rows" if value is None else f"mean {_label(value)}"
    second = [g for g in columns.groups if g != group and frame[g].nunique() <= MAX_SERIES]
    split = rng.choice(second) if second and frame[group].nunique() <= 5 and rng.random() < 0.5 else None
    keys = [labels] if split is None else [labels, frame[split]]
    numbers = frame.assign(_n=1.0) if value is None else frame.assign(_n=frame[value].astype(float))
    grouped = numbers.groupby(keys, observed=True, sort=False)["_n"]
    result = grouped.sum() if value is None else grouped.mean()
    if split is None:
        categories = [str(name).strip() for name in result.index]
        series = [(what, [float(v) for v in result])]
    else:
        wide = result.unstack()
        if wide.isna().to_numpy().any() or min(wide.shape) < 2:
            return None
        categories = [str(name).strip() for name in wide.index]
        series = [(str(name).strip(), [float(v) for v in wide[name]]) for name in wide.columns]
    if len(categories) < 2:
        return None
    parts = split is None and value is None and len(categories) <= 6
    kind = rng.choice(["bar", "hbar", "pie"] if parts else ["bar", "bar", "hbar"])
    return _finish(kind, table, f"{what} by {_label(group)}", _label(group), what, categories, series, rng)


def _over_years(frame: Any, table: str, columns: Columns, rng: random.Random) -> Chart | None:
    """One to four lines over years, whole or a stretch of them."""
    year, value = rng.choice(columns.years), rng.choice(columns.values)
    groupings = [g for g in [*columns.groups] if frame[g].nunique() >= 2]
    group = rng.choice(groupings) if groupings and rng.random() < 0.7 else None
    rows = frame.dropna(subset=[year, value])
    rows = rows.assign(**{year: np.floor(rows[year].astype(float)).astype(int)})
    if group is None:
        means = rows.groupby(year)[value].mean().astype(float).to_frame(_label(value))
    else:
        means = rows.groupby([year, group], observed=True)[value].mean().astype(float).unstack().dropna()
        means = (
            means[[means.columns[k] for k in _pick(rng, range(means.shape[1]), 2, MAX_SERIES)]]
            if means.shape[1] > 1
            else means
        )
    if len(means) < 3:
        return None
    step = max(1, len(means) // MAX_MARKS)
    length = rng.randint(3, min(MAX_MARKS, len(means)))
    start = rng.randint(0, max(0, len(means) - 1 - (length - 1) * step))
    means = means.iloc[start : start + length * step : step].sort_index()
    categories = [str(v) for v in means.index]
    series = [(str(name).strip(), [float(v) for v in means[name]]) for name in means.columns]
    others = [str(v) for v in rows[year].unique()]
    return _finish(
        "line",
        table,
        f"{_label(value)} over {_label(year)}",
        _label(year),
        _label(value),
        categories,
        series,
        rng,
        others,
    )


def _points(frame: Any, table: str, columns: Columns, rng: random.Random) -> Chart | None:
    """A scatter of two columns, coloured by a group where there is one."""
    across, up = rng.sample(columns.values, 2)
    group = rng.choice(columns.groups) if columns.groups and rng.random() < 0.7 else None
    rows = frame[[c for c in (across, up, group) if c]].dropna()
    if len(rows) < 8:
        return None
    rows = rows.iloc[_pick(rng, range(len(rows)), min(12, len(rows)), MAX_POINTS)]
    names = [_label(up)] if group is None else [str(n).strip() for n in rows[group].unique()]
    if len(names) > MAX_SERIES or not names:
        return None
    series = []
    colours = list(COLOURS)
    rng.shuffle(colours)
    for place, name in enumerate(names):
        part = rows if group is None else rows[rows[group].astype(str).str.strip() == name]
        if not len(part):
            return None
        x, y = (tuple(rounded(float(v)) for v in part[c]) for c in (across, up))
        if not all(math.isfinite(v) and abs(v) < 1e7 for v in (*x, *y)):
            return None
        series.append(Series(name, colours[place], y, x))
    flat = [v for s in series for v in s.values]
    level = [v for s in series for v in s.x]
    if len(set(flat)) < 4 or len(set(level)) < 4:
        return None
    title = f"{_label(up)} against {_label(across)}"
    others = (
        ()
        if group is None
        else tuple(str(n).strip() for n in frame[group].dropna().unique() if str(n).strip() not in names)
    )
    return Chart("scatter", table, title[:44], _label(across)[:32], _label(up)[:40], (), tuple(series), others=others)
