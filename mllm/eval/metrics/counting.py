"""How many does a reply count (CountBench, TallyQA)?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean
from mllm.eval.metrics.text import NUMBER_WORDS, references

_NUMBER = re.compile(
    rf"(?<![\w.,-])(?:\d{{1,6}}(?![\w])(?!\.\d)|(?:{'|'.join(NUMBER_WORDS)}|none|no)\b)", re.IGNORECASE
)
_CUE = re.compile(
    r"(?:answer|total|count|altogether)\b[^.\n]{0,20}?(?:is|are|of|[:=])\s*\**\s*$|=\s*\**\s*$", re.IGNORECASE
)
_READ = 2_000


def whole_number(text: str) -> int:
    """``"12"`` and ``"twelve"`` are 12; ``"none"`` and ``"no"`` are 0. Raises KeyError for anything else."""
    return int(text) if text.isdigit() and text.isascii() else ({"none": 0, "no": 0} | NUMBER_WORDS)[text.lower()]


class Count(Metric):
    """Headline: percent of counts that are right; ``rmse`` over the replies that hold one."""

    name = "count"
    protocol = (
        "our counting rule: the one whole number of the reply, in digits or words to twenty (none is 0); of several, the one "
        "an 'answer is', 'total of' or '=' announces last; else unparsed. Of a reply over 2 000 characters the end is read"
    )
    example = ("4", {})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        try:
            wanted = int(float(references(target)[0]))
        except (ValueError, OverflowError):
            raise DataError(f"target {target!r} is no count") from None
        text = prediction[-_READ:]
        found = list(_NUMBER.finditer(text))
        numbers = [whole_number(each[0]) for each in found]
        if not numbers:
            return Score(None, "", "no number")
        count, rule = numbers[0], "the only number"
        if len(set(numbers)) > 1:
            announced = [
                n for n, each in zip(numbers, found) if _CUE.search(text[max(0, each.start() - 48) : each.start()])
            ]
            if not announced:
                return Score(None, "", "several numbers")
            count, rule = announced[-1], "announced"
        return Score(float(count == wanted), str(count), rule, {"error": float(count - wanted)})

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        errors = [item.score.parts["error"] for item in items if "error" in item.score.parts]
        spread = {"rmse": math.sqrt(mean([error * error for error in errors]))} if errors else {}
        return super().aggregate(items) | spread


class CountFirst(Count):
    name = "count_first"
    protocol = "TallyQA as VLMEvalKit scores it: the first whole number from 0 to 20, in digits or words, anywhere"

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        wanted = int(float(references(target)[0]))
        found = re.search(rf"\b(?:\d|1\d|20|{'|'.join(NUMBER_WORDS)})\b", prediction.lower())
        if found is None:
            return Score(None, "", "no number to 20")
        count = whole_number(found[0])
        return Score(float(count == wanted), str(count), "first number", {"error": float(count - wanted)})
