"""How is ChartQAPro scored: lists, years, percent and text in one answer?"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.anls import similarity
from mllm.eval.metrics.base import Metric, Score, Scored, group_means
from mllm.eval.metrics.text import collapse, plain_float, references

_EXACT_TYPES = ("Fact Checking", "Multi Choice")
_UNQUOTED = re.compile(r"(?<!['\w])\w[^,]*?(?!['\w])")


_LONGEST_LIST = 20_000  # characters; what is longer is read as text


def _as_list(text: str) -> list[str] | None:
    if len(text) > _LONGEST_LIST or not text.lstrip(" \t").startswith(("[", "(")):
        return None  # Python's parser takes its time over what cannot be a list
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError):
        return None
    return [str(entry).strip(" '") for entry in value] if isinstance(value, list) else None


def target_items(target: str) -> list[str]:
    """Items of a target; ``[a, b]`` without quotes is quoted first (word by word, as upstream: ``New York`` becomes
    ``NewYork``)."""
    if found := re.match(r"^\[(.*)\]$", target.strip()):
        quoted = "[" + _UNQUOTED.sub(lambda word: f"'{word[0]}'", found[1]) + "]"
        return _as_list(quoted) or _as_list(target) or [target]
    return _as_list(target) or [target]


def item_score(target: str, prediction: str) -> float:
    """5 % for two numbers (percent signs dropped, zero needs zero), else strict ANLS."""
    target, prediction = (text.strip().strip("%").strip() for text in (target, prediction))
    wanted, number = plain_float(target), plain_float(prediction)
    if wanted is not None and number is not None:
        return float(number == 0.0) if wanted == 0.0 else float(abs(number - wanted) / abs(wanted) <= 0.05)
    return similarity(collapse(target.lower()), collapse(prediction.lower()), strict=True)


class ChartQaPro(Metric):
    """``meta``: ``question_type``, ``year`` (a list of YES/NO, one per item of the answer; conversations use the
    last)."""

    name = "chartqapro"
    protocol = "ChartQAPro's script: item by item, years exact, numbers within 5 %, text by strict ANLS"
    binary = False
    exact_types: Sequence[str] = ()

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        kind = str(meta.get("question_type") or "")
        wanted = target_items(references(target)[-1].strip(".").strip("\n"))
        answer = prediction.strip(".").strip("\n")
        given = _as_list(answer) or [answer]
        flags = [str(flag).upper() == "YES" for flag in meta.get("year") or ["NO"]]
        flags = flags[-1:] if kind == "Conversational" else flags
        flags = flags * len(wanted) if len(flags) < len(wanted) else flags
        scores, rules = [], []
        for position in range(max(len(wanted), len(given))):
            if position >= min(len(wanted), len(given)):
                scores.append(0.0)
                rules.append("items differ in number")
            elif flags[position] or kind in self.exact_types:
                scores.append(float(wanted[position].strip().lower() == given[position].strip().lower()))
                rules.append("exact (year)" if flags[position] else f"exact ({kind})")
            else:
                scores.append(item_score(wanted[position], given[position]))
                rules.append("number or text")
        return Score(
            sum(scores) / len(scores), str(given) if len(given) > 1 else answer, ", ".join(dict.fromkeys(rules))
        )

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        return super().aggregate(items) | group_means(items, "question_type", self.scale)


class ChartQaProExact(ChartQaPro):
    name = "chartqapro_exact"
    protocol = "ChartQAPro as lmms-eval runs it: Fact Checking and Multi Choice must match exactly"
    exact_types = _EXACT_TYPES
