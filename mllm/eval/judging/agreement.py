"""Do two judges, or a judge and a person, give the same verdicts?"""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mllm.errors import DataError
from mllm.eval.predictions import Row, iterate_predictions

_NAMED = 1000
SHEET = ("id", "question", "reference", "reply", "verdict")


@dataclass(frozen=True)
class Agreement:
    """Over the samples that both judged. kappa: Cohen's, linear weights where verdicts are more than right and wrong; NaN
    when both always say the same one thing; differing: the first 1,000 ids."""

    first: str
    second: str
    num_samples: int
    agreed: float
    kappa: float
    first_mean: float
    second_mean: float
    differing: list[str]


def cohens_kappa(first: Iterable[float], second: Iterable[float]) -> float:
    """``1 - observed / expected`` disagreement, each pair of verdicts weighing its distance (Cohen 1960, 1968). NaN when no
    disagreement can be expected. Raises `DataError` where they are not equally many."""
    try:
        return _kappa(Counter(zip(first, second, strict=True)))
    except ValueError:
        raise DataError("agreement needs as many verdicts of the one as of the other, on the same samples") from None


def _kappa(pairs: Counter[tuple[float, float]]) -> float:
    """`cohens_kappa` of how often each pair of verdicts comes."""
    total = pairs.total()
    sides = [Counter[float](), Counter[float]()]
    for pair, count in pairs.items():
        for side, level in zip(sides, pair):
            side[level] += count
    expected = sum(
        p / total * (q / total) * abs(a - b) for a, p in sorted(sides[0].items()) for b, q in sorted(sides[1].items())
    )
    observed = sum(count * abs(a - b) for (a, b), count in pairs.items()) / total
    return 1 - observed / expected if expected else float("nan")


def agreement(names: tuple[str, str], first: Mapping[str, float], second: Mapping[str, float]) -> Agreement:
    """Compare verdicts by id. Raises `DataError` when no sample has both."""
    pairs: Counter[tuple[float, float]] = Counter()
    differing: list[str] = []
    for name in first:
        if (other := second.get(name)) is None:
            continue
        pair = round(first[name], 1), round(other, 1)
        pairs[pair] += 1
        if pair[0] != pair[1] and len(differing) < _NAMED:
            differing.append(name)
    total = pairs.total()
    if not total:
        raise DataError(f"{names[0]} and {names[1]} judged no sample in common")
    agreed = sum(count for (a, b), count in pairs.items() if a == b) / total
    first_mean, second_mean = (sum(count * pair[side] for pair, count in pairs.items()) / total for side in (0, 1))
    return Agreement(*names, total, agreed, _kappa(pairs), first_mean, second_mean, differing)


def write_sheet(predictions: str | Path, path: str | Path, number: int, *, seed: int = 0) -> Path:
    """A CSV of ``number`` random answers for a person to fill in the verdicts (1 right, 0 wrong); no judge's verdict is shown.
    predictions: their file, read row by row. Raises `DataError` rather than write over a sheet."""
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists; a sheet that may hold hand verdicts is not written over")

    def usable() -> Iterator[Row]:
        rows = iterate_predictions(Path(predictions))
        return (row for row in rows if row["target"] is not None and not row.get("unusable") and not row.get("error"))

    total = sum(1 for _ in usable())
    places = random.Random(seed).sample(range(total), min(number, total))
    wanted = set(places)
    found = {place: row for place, row in enumerate(usable()) if place in wanted}
    chosen = [found[place] for place in places]
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(SHEET)
        for row in chosen:
            writer.writerow(
                [row["id"], row["question"], json.dumps(row["target"], ensure_ascii=False), row["output"], ""]
            )
    return path


def read_hand_verdicts(path: str | Path) -> dict[str, float]:
    """Id → verdict of a filled-in sheet (CSV with ``id`` and ``verdict``: 1/0, yes/no, right/wrong, or a number). Rows left empty
    are not verdicts. Raises `DataError` naming the line."""
    path = Path(path)
    words = {"1": 1.0, "0": 0.0, "yes": 1.0, "no": 0.0, "right": 1.0, "wrong": 0.0, "true": 1.0, "false": 0.0}
    found: dict[str, float] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise DataError(f"{path}: hand verdicts cannot be read ({error})") from None
    for number, row in enumerate(rows, 2):
        if "id" not in row or "verdict" not in row:
            raise DataError(f"{path}: needs the columns id and verdict; it has {', '.join(map(str, row))}")
        text = (row["verdict"] or "").strip().lower()
        if not text:
            continue
        try:
            found[str(row["id"])] = words[text] if text in words else float(text)
        except ValueError:
            raise DataError(f"{path}:{number}: verdict {text!r}; expected 1 or 0, yes or no, or a number") from None
    if not found:
        raise DataError(f"{path}: no verdict is filled in")
    return found
