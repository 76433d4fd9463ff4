"""Is a chart answer right within 5 percent (ChartQA, PlotQA)?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.text import collapse, percent_or_float, references, tagged

_TOLERANCE = Decimal("0.05")
_MOST_DIGITS = 1_000  # a longer run of digits is no answer, and in time no `Decimal` either
_YEARS = range(1800, 2101)
_END_MARKS = ".,;:!?\"'`*"
_CURRENCY = (  # as a sign, or as a code that stands alone or touches the number
    r"(?:(?:US|U\.S\.|CA?|AU?|NZ|HK|SG|S|NT|R|MX)?\$|[€£¥₹₩₽₺₫฿]|"
    r"(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|HKD|SGD|KRW|BRL|MXN|SEK|NOK|DKK|Rs\.?)(?![A-Za-z]))"
)
_SCALES = {
    "hundred": 2, "thousand": 3, "thousands": 3, "k": 3, "million": 6, "millions": 6, "mn": 6, "m": 6,
    "billion": 9, "billions": 9, "bn": 9, "b": 9, "trillion": 12, "trillions": 12, "tn": 12, "t": 12,
}  # fmt: skip
_SCALE_NAMES = {3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
_NUMBER = re.compile(
    rf"((?:[-+−–]|{_CURRENCY}|\s)*+)((?:\d{{1,3}}(?:,\d{{3}})++|\d++)(?:\.\d++)?|\.\d++)(?:e([-+]?\d{{1,3}}))?+",
    re.ASCII | re.IGNORECASE,
)
_MONEY = re.compile(rf"\s*{_CURRENCY}\s*", re.IGNORECASE)
_WORKED = re.compile(r"[-−+\d., ]*\d[-−+\d., ]* = ([^=\n]+)")
_UNIT = re.compile(r"[^\W\d]*+(?:[ /.²³°'\"-]++[^\W\d]++){0,3}+\.?|°[CFcf]?")


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


@dataclass(frozen=True)
class Quantity:
    """One way to read text that is one number with at most a unit. ``how`` names the choice made, where there is one."""

    value: Decimal
    unit: str
    percent: bool
    how: str = ""


def quantities(text: str) -> list[Quantity]:
    """Every reading of text that is one number with at most a unit; empty for other text.

    Sign and currency stand in any order (``-$5``, ``$-5``, ``US$5``, ``5 USD``); brackets are an accountant's minus. A
    letter that can be a unit or a scale (``5 m``: metres, millions) gives a reading for each, the unit first.
    """
    text = text.strip()
    if (money := _MONEY.match(text)) and text[money.end() :].startswith("("):
        text = text[money.end() :]
    bracketed = text.startswith("(") and text.endswith(")")
    found = _NUMBER.match(text[1:-1] if bracketed else text)
    if found is None or len(found[2]) > _MOST_DIGITS:
        return []
    before, digits, exponent = found.groups()
    signs = [mark for mark in before if mark in "-+−–"]
    if len(signs) + bracketed > 1:
        return []
    value = Decimal(digits.replace(",", "")) * (Decimal(10) ** int(exponent) if exponent else 1)
    if bracketed or (signs and signs[0] != "+"):
        value = -value
    rest = found.string[found.end() :].strip()
    percent = rest.startswith("%") or rest.lower() in ("percent", "per cent", "percentage points")
    rest = "" if percent and not rest.startswith("%") else rest.lstrip("%").strip()
    readings = []
    for scale, unit, how in _scales(_without_money(rest)):
        if _UNIT.fullmatch(unit := _without_money(unit)):
            readings.append(Quantity(value * Decimal(10) ** scale, unit.lower(), percent, how))
    return readings


def _scales(rest: str) -> list[tuple[int, str, str]]:
    """(power of ten, unit, which reading this is) of what stands behind a number."""
    word, _, tail = rest.partition(" ")
    scale = _SCALES.get(word.lower().rstrip("."))
    if scale is None:
        return [(0, rest, "")]
    if len(word.rstrip(".")) > 1:
        return [(scale, tail.strip(), "")]
    return [(0, rest, f"{word} as a unit"), (scale, tail.strip(), f"{word} as {_SCALE_NAMES[scale]}")]


def _without_money(text: str) -> str:
    """The text without a currency at either end."""
    if found := _MONEY.match(text):
        text = text[found.end() :]
    word = text.rpartition(" ")[2]
    return text[: len(text) - len(word)].strip() if word and _MONEY.fullmatch(word) else text.strip()


def _near(predicted: Decimal, wanted: Decimal) -> bool:
    return predicted == wanted if wanted == 0 else abs(predicted - wanted) <= _TOLERANCE * abs(wanted)


def _same_quantity(wanted: Sequence[Quantity], predicted: Sequence[Quantity]) -> tuple[bool, str]:
    """Whether some reading of the one is near some reading of the other → (right?, which decided)."""
    comparable = False
    for goal, given in itertools.product(wanted, predicted):
        if goal.unit and given.unit and goal.unit != given.unit:
            continue
        comparable = True
        values = [given.value]
        if goal.percent != given.percent:
            values.append(given.value / 100 if given.percent else given.value * 100)
        if any(_near(value, goal.value) for value in values):
            choices = ", ".join(dict.fromkeys(how for how in (given.how, goal.how) if how))
            return True, "number within 5%" + (f" ({choices})" if choices else "")
    return False, "number within 5%" if comparable else "different units"


def strict_match(target: str, prediction: str, *, year: bool = False) -> tuple[bool, str]:
    """The strict rule on one reference → (right?, which comparison decided). Decimal arithmetic, so no rounding luck.

    A target that is an integer in 1800–2100 and carries no unit, or one flagged ``year``, must be met exactly.
    Thousands separators, signs, currencies and units are read; two different units do not match; ``5%`` is 5 and is
    0.05; a letter that can be a unit or a scale (``5 m``) is tried both ways and the rule names the one that fitted.
    A zero target needs zero. Trailing punctuation never decides.
    """
    target, prediction = (collapse(text).strip(" ") for text in (target, prediction))
    bare_target, bare_prediction = (text.rstrip(_END_MARKS + " ") for text in (target, prediction))
    wanted, predicted = quantities(bare_target), quantities(bare_prediction)
    if year or (wanted and bare_target.isdigit() and len(bare_target) == 4 and int(bare_target) in _YEARS):
        return bare_prediction.lower() == bare_target.lower(), "year, exact"
    if wanted and predicted:
        return _same_quantity(wanted, predicted)
    outer = [text.startswith("[") and text.endswith("]") for text in (bare_target, bare_prediction)]
    if all(outer):
        pairs = [[part.strip(" '\"") for part in text[1:-1].split(",")] for text in (bare_target, bare_prediction)]
        same = len(pairs[0]) == len(pairs[1]) and all(strict_match(t, p)[0] for t, p in zip(*pairs))
        return same, "list, item by item"
    left, right = (text.strip("\"'`* ").lower() for text in (bare_target, bare_prediction))
    return left == right, "text"


class RelaxedStrict(Metric):
    """tag: the answer stands between ``<tag>`` and ``</tag>`` of the reply; without them the whole reply is compared. worked: in a reply
    of numbers and an equals sign (``842 - 616 = 226``, ``842, 616 = yes``) the answer is what follows it."""

    name = "relaxed_strict"
    version = "2"
    protocol = (
        "relaxed accuracy, strict: years exact, zero needs zero, thousands, sign and currency in any order, units and % "
        "are read, k, m, b and t are tried as a unit and as a scale (the rule says which), trailing punctuation "
        "ignored, 5 % in exact decimal arithmetic"
    )

    def __init__(self, tag: str | None = None, worked: bool = False):
        self.tag, self.worked = tag, worked

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        if self.tag is not None and (inside := tagged(prediction, self.tag)) is not None:
            prediction = inside
        if self.worked and (found := _WORKED.fullmatch(prediction.strip())) is not None:
            prediction = found[1]
        rule, year = "text", bool(meta.get("is_year"))
        answer = collapse(prediction).rstrip(_END_MARKS + " ")
        for reference in references(target):
            right, rule = strict_match(reference, prediction, year=year)
            if right:
                return Score(1.0, answer, rule)
        return Score(0.0, answer, rule) if answer else Score(None, "", "empty")
