"""Is a chart answer right within 5 percent (ChartQA, PlotQA)?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.text import collapse, percent_or_float, references

_TOLERANCE = Decimal("0.05")
_YEARS = range(1800, 2101)
_END_MARKS = ".,;:!?\"'`*"
_CURRENCY = "$€£¥₹"
_SCALES = {
    "hundred": 2, "thousand": 3, "thousands": 3, "k": 3, "million": 6, "millions": 6, "mn": 6, "m": 6,
    "billion": 9, "billions": 9, "bn": 9, "b": 9, "trillion": 12, "trillions": 12, "tn": 12,
}  # fmt: skip
_NUMBER = re.compile(
    r"([-+−]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e([-+]?\d{1,3}))?", re.ASCII | re.IGNORECASE
)
_UNIT = re.compile(r"[^\W\d]*(?:[ /.²³°'\"-]*[^\W\d]+){0,3}\.?|°[CFcf]?")


def relaxed_match(target: str, prediction: str) -> tuple[bool, str]:
    """pix2struct's rule on one reference → (right?, which comparison decided)."""
    predicted, wanted = percent_or_float(prediction), percent_or_float(target)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= 0.05, "number within 5%"
    return prediction.lower() == target.lower(), "text"


class RelaxedPix2Struct(Metric):
    name = "relaxed_pix2struct"
    protocol = (
        "relaxed accuracy by pix2struct's function: 5 %, years too; nothing is stripped, a zero target is compared "
        "as text"
    )

    def prepare(self, prediction: str) -> str:
        return prediction

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = self.prepare(prediction)
        rule = "text"
        for reference in references(target):
            right, rule = relaxed_match(reference, answer)
            if right:
                return Score(1.0, answer, rule)
        return Score(0.0, answer, rule)


class RelaxedStripped(RelaxedPix2Struct):
    name = "relaxed_stripped"
    protocol = "relaxed accuracy as lmms-eval runs it: pix2struct's function on the prediction without outer whitespace"

    def prepare(self, prediction: str) -> str:
        return prediction.strip()


def quantity(text: str) -> tuple[Decimal, str, bool] | None:
    """(number, unit, percent sign?) of text that is one number with at most a unit; None otherwise."""
    text = text.strip().lstrip(_CURRENCY).strip()
    negative = text.startswith("(") and text.endswith(")")  # accountants' minus
    if negative:
        text = text[1:-1].strip().lstrip(_CURRENCY)
    found = _NUMBER.match(text)
    if found is None:
        return None
    sign, digits, exponent = found.groups()
    value = Decimal(digits.replace(",", "")) * (Decimal(10) ** int(exponent) if exponent else 1)
    if sign in ("-", "−") or negative:
        value = -value
    rest = text[found.end() :].strip()
    percent = rest.startswith("%") or rest.lower() in ("percent", "per cent", "percentage points")
    rest = "" if percent and not rest.startswith("%") else rest.lstrip("%").strip()
    word, _, tail = rest.partition(" ")
    if word.lower().rstrip(".") in _SCALES and (len(word) > 1 or not tail):
        value *= Decimal(10) ** _SCALES[word.lower().rstrip(".")]
        rest = tail.strip()
    rest = rest.strip(_CURRENCY).strip()
    return (value, rest.lower(), percent) if _UNIT.fullmatch(rest) else None


def _near(predicted: Decimal, wanted: Decimal) -> bool:
    return predicted == wanted if wanted == 0 else abs(predicted - wanted) <= _TOLERANCE * abs(wanted)


def strict_match(target: str, prediction: str, *, year: bool = False) -> tuple[bool, str]:
    """The strict rule on one reference → (right?, which comparison decided). Decimal arithmetic, so no rounding luck.

    A target that is an integer in 1800–2100 and carries no unit, or one flagged ``year``, must be met exactly.
    Thousands separators, currency signs and units are read; two different units do not match; ``5%`` is 5 and is 0.05.
    A zero target needs zero. Trailing punctuation never decides.
    """
    target, prediction = (collapse(text).strip(" ") for text in (target, prediction))
    bare_target, bare_prediction = (text.rstrip(_END_MARKS + " ") for text in (target, prediction))
    wanted, predicted = quantity(bare_target), quantity(bare_prediction)
    if year or (wanted is not None and bare_target.isdigit() and len(bare_target) == 4 and int(bare_target) in _YEARS):
        return bare_prediction.lower() == bare_target.lower(), "year, exact"
    if wanted is not None and predicted is not None:
        if wanted[1] and predicted[1] and wanted[1] != predicted[1]:
            return False, "different units"
        readings = [predicted[0]]
        if wanted[2] != predicted[2]:
            readings.append(predicted[0] / 100 if predicted[2] else predicted[0] * 100)
        return any(_near(reading, wanted[0]) for reading in readings), "number within 5%"
    outer = [text.startswith("[") and text.endswith("]") for text in (bare_target, bare_prediction)]
    if all(outer):
        pairs = [[part.strip(" '\"") for part in text[1:-1].split(",")] for text in (bare_target, bare_prediction)]
        same = len(pairs[0]) == len(pairs[1]) and all(strict_match(t, p)[0] for t, p in zip(*pairs))
        return same, "list, item by item"
    left, right = (text.strip("\"'`* ").lower() for text in (bare_target, bare_prediction))
    return left == right, "text"


class RelaxedStrict(Metric):
    name = "relaxed_strict"
    protocol = (
        "relaxed accuracy, strict: years exact, zero needs zero, thousands, currency, units and % are read, "
        "trailing punctuation ignored, 5 % in exact decimal arithmetic"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        rule, year = "text", bool(meta.get("is_year"))
        answer = collapse(prediction).rstrip(_END_MARKS + " ")
        for reference in references(target):
            right, rule = strict_match(reference, prediction, year=year)
            if right:
                return Score(1.0, answer, rule)
        return Score(0.0, answer, rule) if answer else Score(None, "", "empty")
