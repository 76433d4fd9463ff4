"""Do two judges, or a judge and a person, give the same verdicts?"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.errors import DataError
from mllm.eval.predictions import Row

SHEET = ("id", "question", "reference", "reply", "verdict")


@dataclass(frozen=True)
class Agreement:
    """Over the samples that both judged. kappa: Cohen's, linear weights where verdicts are more than right and wrong; NaN
    when both always say the same one thing."""

    first: str
    second: str
    num_samples: int
    agreed: float
    kappa: float
    first_mean: float
    second_mean: float
    differing: list[str]


def cohens_kappa(first: Sequence[float], second: Sequence[float]) -> float:
    """``1 - observed / expected`` disagreement, each pair of verdicts weighing its distance (Cohen 1960, 1968). NaN when no
    disagreement can be expected."""
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} verdicts; agreement needs them on the same samples")
    levels = sorted({*first, *second})
    total = len(first)
    shares = [[sum(v == level for v in side) / total for level in levels] for side in (first, second)]
    expected = sum(p * q * abs(a - b) for a, p in zip(levels, shares[0]) for b, q in zip(levels, shares[1]))
    observed = sum(abs(a - b) for a, b in zip(first, second)) / total
    return 1 - observed / expected if expected else float("nan")


def agreement(names: tuple[str, str], first: Mapping[str, float], second: Mapping[str, float]) -> Agreement:
    """Compare verdicts by id. Raises `DataError` when no sample has both."""
    shared = [name for name in first if name in second]
    if not shared:
        raise DataError(f"{names[0]} and {names[1]} judged no sample in common")
    left, right = [round(first[name], 1) for name in shared], [round(second[name], 1) for name in shared]
    differing = [name for name, a, b in zip(shared, left, right) if a != b]
    share = 1 - len(differing) / len(shared)
    means = (sum(left) / len(left), sum(right) / len(right))
    return Agreement(*names, len(shared), share, cohens_kappa(left, right), *means, differing)


def write_sheet(rows: Sequence[Row], path: str | Path, number: int, *, seed: int = 0) -> Path:
    """A CSV of ``number`` random answers for a person to fill in the verdicts (1 right, 0 wrong); no judge's verdict is shown.
    Raises `DataError` rather than write over a sheet."""
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists; a sheet that may hold hand verdicts is not written over")
    usable = [row for row in rows if row["target"] is not None and not row.get("unusable") and not row.get("error")]
    chosen = random.Random(seed).sample(usable, min(number, len(usable)))
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
