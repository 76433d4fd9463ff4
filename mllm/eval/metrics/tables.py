"""How close is a predicted table to the chart's own (DePlot's RMS-F1 and RNSS)?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm.eval.metrics.anls import similarity
from mllm.eval.metrics.base import Metric, Score, Scored, mean
from mllm.eval.metrics.text import EditDistances, percent_or_float, plain_float, references

_NUMBER_LIMIT = 0.1


def data_points(table: str, *, transposed: bool = False) -> dict[str, str]:
    """``"row header column header" → cell`` (and ``"title" → title``) of a table in DePlot's text form: lower case,
    one line a row, cells parted by ``" | "``. A key that occurs twice keeps its last cell."""
    lines = table.replace("<0x0A>", "\n").lower().splitlines()
    points: dict[str, str] = {}
    if lines and lines[0].startswith("title |"):
        points["title"] = lines.pop(0).removeprefix("title |").strip()
    rows = [tuple(cell.strip() for cell in line.split(" | ")) for line in lines]
    if transposed:
        rows = list(itertools.zip_longest(*rows, fillvalue=""))
    if len(rows) > 1 and len(rows[0]) > 1:
        for row in rows[1:]:
            points.update({f"{row[0]} {header}": cell for header, cell in zip(rows[0][1:], row[1:])})
    return points


def relative_distance(target: float, prediction: float) -> float:
    """``min(1, |t - p| / |t|)``; for a target of 0: 0 when the prediction is 0, else 1 (DePlot's code has these two the
    wrong way round)."""
    return min(abs((target - prediction) / target), 1.0) if target else float(bool(prediction))


def value_similarity(target: str, prediction: str) -> float:
    """Similarity of two cells: numbers by relative distance (0 from a distance of 0.1 on), text by strict ANLS."""
    wanted, number = percent_or_float(target), percent_or_float(prediction)
    if number is not None and wanted:
        distance = relative_distance(wanted, number)
        return 1 - distance if distance < _NUMBER_LIMIT else 0.0
    return 1.0 if target == prediction else similarity(target, prediction, strict=True)


def match_points(target: Mapping[str, str], prediction: Mapping[str, str]) -> tuple[float, float, float]:
    """(precision, recall, F1) of the cheapest assignment of predicted keys to target keys, each pair weighing key
    similarity × value similarity."""
    if not target or not prediction:
        return (1.0, 1.0, 1.0) if not target and not prediction else (1.0, 0.0, 0.0) if target else (0.0, 1.0, 0.0)
    from scipy.optimize import linear_sum_assignment

    wanted, given = list(target.items()), list(prediction.items())
    keys = _key_similarities(list(target), list(prediction))
    rows, columns = linear_sum_assignment(1 - keys)
    total = float(sum(keys[r, c] * value_similarity(wanted[r][1], given[c][1]) for r, c in zip(rows, columns)))
    if total == 0:
        return 0.0, 0.0, 0.0
    precision, recall = total / len(given), total / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _key_similarities(wanted: Sequence[str], given: Sequence[str]) -> np.ndarray:
    """Strict ANLS of every pair ``(wanted, given)``, each given key walked over once for all wanted ones."""
    measure, longest = EditDistances(wanted), max(map(len, wanted))
    # A key of more than twice the length is below one half whatever its letters: it counts as wholly unlike.
    distances = np.array([measure(key) if len(key) <= 2 * longest else len(wanted) * [len(key)] for key in given]).T
    lengths = np.maximum.outer([len(key) for key in wanted], [len(key) for key in given])
    values = 1 - distances / np.maximum(lengths, 1)
    return np.where(values > 0.5, values, 0.0)


class RmsF1(Metric):
    """Relative mapping similarity (DePlot, arXiv 2212.10505). The best of the references and of the prediction as it
    stands or transposed counts.

    upstream_compat: DePlot's per-point function stores recall under the name F1; True reports that.
    """

    name = "rms_f1"
    protocol = (
        "DePlot's RMS: true F1 of the matched data points, best over references and over the transposed prediction; "
        "the token <0x0A> ends a line"
    )
    binary = False

    def __init__(self, upstream_compat: bool = False):
        self.upstream_compat = upstream_compat

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        best, form = (0.0, 0.0, -1.0), ""
        for transposed in (True, False):
            points = data_points(prediction, transposed=transposed)
            for reference in references(target):
                result = match_points(data_points(reference), points)
                if result[2] > best[2]:
                    best, form = result, "transposed" if transposed else "as it stands"
        precision, recall, f1 = best
        value = recall if self.upstream_compat else f1
        return Score(
            value,
            form,
            "recall as F1" if self.upstream_compat else "F1",
            {"precision": precision, "recall": recall, "f1": f1},
        )

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        parts = {
            part: self.scale * mean(float(item.score.parts.get(part, 0.0)) for item in items)
            for part in ("precision", "recall", "f1")
        }
        return super().aggregate(items) | parts


def table_numbers(table: str) -> list[float]:
    """Every cell that is a plain number, in order; percent cells are none."""
    cells = [cell for line in table.replace("<0x0A>", "\n").splitlines() for cell in line.split(" | ") if cell.strip()]
    return [number for cell in cells if (number := plain_float(cell)) is not None]


class Rnss(Metric):
    """Relative number set similarity (DePlot, arXiv 2212.10505).

    upstream_compat: DePlot's code gives a target of 0 the distance 1 from a predicted 0 and 0 from anything else; True
    does the same.
    """

    name = "rnss"
    protocol = (
        "DePlot's relative number set similarity: best assignment of the tables' numbers by relative distance; a target "
        "of 0 is met by 0 only (DePlot's code has it the other way round: upstream_compat); the token <0x0A> ends a line"
    )
    binary = False

    def __init__(self, upstream_compat: bool = False):
        self.upstream_compat = upstream_compat

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        given = table_numbers(prediction)
        values = [self._similarity(table_numbers(reference), given) for reference in references(target)]
        return Score(max(values), f"{len(given)} numbers", "number set")

    def _distance(self, target: float, prediction: float) -> float:
        if self.upstream_compat and not target:
            return float(not prediction)
        return relative_distance(target, prediction)

    def _similarity(self, wanted: Sequence[float], given: Sequence[float]) -> float:
        if not wanted or not given:
            return float(not wanted and not given)
        from scipy.optimize import linear_sum_assignment

        cost = np.array([[self._distance(t, p) for p in given] for t in wanted])
        rows, columns = linear_sum_assignment(cost)
        return float(1 - cost[rows, columns].sum() / max(len(wanted), len(given)))
