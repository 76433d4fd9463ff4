"""How are MathVista answers read and normalised without a language model?"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.base import Metric, Score, Scored, group_means
from mllm.eval.metrics.text import EditDistances, plain_float, references

_QUOTED = 'The answer is "'
_SAYS = re.compile(
    r"(?:answer|result)(?:\s+is|\s*[:=])\s*(?:approximately\s+|about\s+)?(.+?)(?:\.(?!\d)|\n|$)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def extract(reply: str, choices: Sequence[str], question_type: str, answer_type: str) -> tuple[str, str]:
    """(extracted answer, rule). The published quick rules first; then, where the published script asks a language
    model, the last 'answer is …' and for number questions the last number in it (or in the reply)."""
    reply = reply.strip()
    if reply in choices:
        return reply, "a choice"
    if plain_float(reply) is not None:
        return reply, "a number"
    if (quoted := _quoted(reply)) is not None:
        return quoted, "quoted answer"
    announced = _SAYS.findall(reply)
    tail = announced[-1].strip(" *$`\"'") if announced else ""
    if question_type != "multi_choice" and answer_type in ("integer", "float"):
        for text, rule in ((tail, "number after 'answer is'"), (reply, "last number")):
            if numbers := _NUMBER.findall(text):
                return numbers[-1].replace(",", ""), rule
        return "", "no number"
    return (tail, "after 'answer is'") if tail else (reply, "whole reply")


def _quoted(reply: str) -> str | None:
    """What the published pattern ``The answer is "(.*)"\\.`` finds: the first line that holds one, up to its last
    quote. The pattern itself reads the rest of the line anew from each of its beginnings."""
    for line in reply.split("\n"):
        start = line.find(_QUOTED)
        end = line.rfind('".', start + len(_QUOTED)) if start >= 0 else -1
        if end >= 0:
            return line[start + len(_QUOTED) : end]
    return None


def normalise(extraction: str, meta: Mapping[str, Any]) -> tuple[str | None, str]:
    """(normal form or None, rule) by the published normalisation: choice text, truncated integer, float rounded to
    ``precision``, or the list as text."""
    choices = [str(choice) for choice in meta.get("options") or []]
    extraction = extraction.strip()
    if not extraction:
        return None, "empty"
    if meta.get("question_type") == "multi_choice":
        bracketed = re.findall(r"\(([a-zA-Z])\)", extraction)
        letter = bracketed[0].upper() if bracketed else extraction
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
            return choices[string.ascii_uppercase.index(letter)], "letter"
        distances = EditDistances(choices)(letter)
        nearest = choices[distances.index(min(distances))]
        return nearest, "equal choice" if nearest == letter else "nearest choice"
    kind, number = meta.get("answer_type"), plain_float(extraction)
    if kind in ("integer", "float"):
        places = plain_float(meta.get("precision"))
        if number is None or number in (float("inf"), float("-inf")) or number != number:
            return None, "not a number"
        if kind == "integer":
            return str(int(number)), "truncated integer"
        return str(round(number, int(places) if places is not None and places == places else 2)), "rounded float"
    return extraction, "text"


class MathVista(Metric):
    """``meta``: ``question_type`` (multi_choice or free_form), ``answer_type``, ``precision``, ``options``."""

    name = "mathvista"
    protocol = (
        "MathVista's quick extraction and normalisation; rules stand in for its language-model extractor (named in "
        "the rule)"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        choices = [str(choice) for choice in meta.get("options") or []]
        kinds = str(meta.get("question_type")), str(meta.get("answer_type"))
        extraction, how = extract(prediction, choices, *kinds)
        value, rule = normalise(extraction, meta)
        if value is None:
            return Score(None, extraction, f"{how}; {rule}")
        return Score(float(value in references(target)), value, f"{how}; {rule}")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        return (
            super().aggregate(items) | group_means(items, "task", self.scale) | group_means(items, "source", self.scale)
        )
