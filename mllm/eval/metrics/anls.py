"""How close is an answer to a reference, letter by letter (DocVQA, InfoVQA, ST-VQA)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.text import collapse, edit_distance, references


def similarity(left: str, right: str, *, strict: bool, length: int | None = None) -> float:
    """1 - edit distance / longer length (or ``length``), 0 below one half; exactly one half is kept unless ``strict``.
    Two empty strings are equal (1)."""
    if length is None:
        length = max(len(left), len(right))
    if 2 * abs(len(left) - len(right)) > length:
        return 0.0
    value = 1.0 if length == 0 else 1 - edit_distance(left, right) / length
    return 0.0 if value < 0.5 or (strict and value == 0.5) else value


class AnlsRrc(Metric):
    """Average normalised Levenshtein similarity."""

    name = "anls_rrc"
    version = "2"
    protocol = (
        "ANLS as the RRC server: lower case, whitespace collapsed on both sides of the ratio, lengths counted in upper "
        "case (ß is two letters), exactly 0.5 kept"
    )
    binary = False

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = collapse(prediction.lower())
        value = max(self.compare(reference, prediction) for reference in references(target))
        rule = "equal" if value == 1 else "similar" if value > 0 else "below one half"
        return Score(value, answer, rule)

    def compare(self, reference: str, prediction: str) -> float:
        wanted, answer = collapse(reference.lower()), collapse(prediction.lower())
        length = max(len(collapse(text).upper()) for text in (reference, prediction))
        return similarity(wanted, answer, strict=False, length=length)


class AnlsStrict(AnlsRrc):
    name = "anls_strict"
    version = "1"
    protocol = "ANLS with the strict threshold of pix2struct and ChartQAPro: a similarity of exactly 0.5 counts 0"

    def compare(self, reference: str, prediction: str) -> float:
        return similarity(collapse(reference.lower()), collapse(prediction.lower()), strict=True)


class AnlsRrcRaw(Metric):
    name = "anls_rrc_raw"
    protocol = (
        "ANLS by the RRC script to the letter: distance on collapsed text over the length of the raw text, so "
        "padding helps"
    )
    binary = False

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = collapse(prediction.lower())
        best = 1.0
        for reference in references(target):
            length, wanted = max(len(reference.upper()), len(prediction.upper())), collapse(reference.lower())
            if 2 * abs(len(wanted) - len(answer)) <= length:  # else below one half, whatever the letters
                best = min(best, 0.0 if length == 0 else edit_distance(wanted, answer) / length)
        value = 0.0 if 1 - best < 0.5 else 1 - best
        return Score(value, answer, "equal" if value == 1 else "similar" if value > 0 else "below one half")
