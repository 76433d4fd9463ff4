"""How are VSI-Bench's choices and numbers scored, and rewarded in training?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean, means_by
from mllm.eval.metrics.text import plain_float, references

NUMBER_TYPES = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
DIRECTION = "object_rel_direction"
CHOICE_TYPES = (
    f"{DIRECTION}_easy", f"{DIRECTION}_medium", f"{DIRECTION}_hard", "object_rel_distance", "route_planning",
    "obj_appearance_order",
)  # fmt: skip
_CONFIDENCES = np.linspace(0.5, 0.95, 10)


def mean_relative_accuracy(prediction: float, target: float) -> float:
    """Share of the ten confidences c in 0.50 … 0.95 with ``|p - t| / |t| <= 1 - c``, in double precision (so 4 for 5
    gives 0.6). A target of 0 is met by exactly 0 only (upstream divides by zero); for a negative target the size of
    the target counts (upstream's ratio is negative there and gives 1 to anything). Thinking in Space, arXiv
    2412.14171."""
    if target == 0:
        return float(prediction == 0)
    return float((abs(prediction - target) / abs(target) <= 1 - _CONFIDENCES).mean())


def mean_relative_accuracy_fp32(prediction: float, target: float) -> float:
    """Spatial-MLLM's form (arXiv 2505.23747): fp32, strict inequality, ``|p - t| / (|t| + 1e-8)``."""
    p, t = np.float32(prediction), np.float32(target)
    error = np.abs(p - t) / (np.abs(t) + np.float32(1e-8))
    return float((error < np.float32(1) - _CONFIDENCES.astype(np.float32)).mean())


class VsiBench(Metric):
    """``meta.question_type`` chooses between mean relative accuracy and choice. Headline: mean over the tasks that
    occur, the three levels of relative direction counted as one task."""

    name = "vsibench"
    protocol = (
        "VSI-Bench: first space-separated token; mean relative accuracy for numbers, letter equality for choices; "
        "mean of tasks. A negative target counts by its size and 0 is met by 0 (the published ratio gives 1 to anything, "
        "or divides by zero)"
    )
    binary = False
    is_mean = False
    example = (["3"], {"question_type": "object_counting"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        kind, wanted = _kind(meta), references(target)[0]
        token = prediction.split(" ")[0].rstrip(".").strip()
        if kind in CHOICE_TYPES:
            if not token:
                return Score(None, "", "empty first token")
            return Score(float(token.lower() == wanted.strip().lower()), token, "first token")
        number, truth = plain_float(token), plain_float(wanted)
        if truth is None:
            raise DataError(f"target {target!r} of a {kind} question is not a number")
        if number is None:
            return Score(None, token, "first token is no number")
        return Score(mean_relative_accuracy(number, truth), token, "mean relative accuracy")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        kind = _kind(item.meta)
        return kind, (1.0, item.value, float(kind.startswith(DIRECTION)))

    def headline(self, parts: np.ndarray) -> float:
        count, total, direction = parts[parts[:, 0] > 0].T
        each, levels = total / count, direction > 0
        return self.scale * mean([*each[~levels], *([mean(each[levels])] if levels.any() else [])])

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        each = means_by(((_kind(item.meta), item.value) for item in items), self.scale)
        levels = [value for kind, value in each.items() if kind.startswith(DIRECTION)]
        tasks = [value for kind, value in each.items() if not kind.startswith(DIRECTION)] + (
            [mean(levels)] if levels else []
        )
        return {"score": mean(tasks)} | ({DIRECTION: mean(levels)} if levels else {}) | each


def _kind(meta: Mapping[str, Any]) -> str:
    kind = str(meta.get("question_type"))
    if kind not in NUMBER_TYPES and kind not in CHOICE_TYPES:
        raise DataError(f"question_type {kind!r} is none of VSI-Bench's: {', '.join(NUMBER_TYPES + CHOICE_TYPES)}")
    return kind


def clean_answer(text: str) -> str:
    """Content of the last ``<answer>`` pair if there is one, in one line of lower case, trailing dots off."""
    answer, place = text, 0
    while (start := text.find("<answer>", place)) >= 0 and (end := text.find("</answer>", start)) >= 0:
        answer, place = text[start + len("<answer>") : end], end
    return " ".join(answer.split()).rstrip(".").lower()


class VsiBenchReward(VsiBench):
    name = "vsibench_reward"
    protocol = (
        "Spatial-MLLM's reading: the last <answer> pair, commas in numbers removed, whole text; fp32 mean relative "
        "accuracy"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        kind, answer, wanted = _kind(meta), clean_answer(prediction), clean_answer(references(target)[0])
        if kind in CHOICE_TYPES:
            return Score(float(answer == wanted), answer, "whole text") if answer else Score(None, "", "empty")
        number, truth = plain_float(answer.replace(",", "")), plain_float(wanted.replace(",", ""))
        if truth is None:
            raise DataError(f"target {target!r} of a {kind} question is not a number")
        if number is None:
            return Score(None, answer, "not a number")
        return Score(mean_relative_accuracy_fp32(number, truth), answer, "mean relative accuracy")


class NumberOrChoice:
    """The reward of answers about space, for a grpo stage: `VsiBenchReward` of a row that says its ``question_type``; of others mean
    relative accuracy where the row's own answer is a number, equality of the whole text where it is none (arXiv 2505.23747)."""

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        number = plain_float(clean_answer(references(target)[0]).replace(",", ""))
        kind = meta.get("question_type") or (CHOICE_TYPES if number is None else NUMBER_TYPES)[0]
        return VsiBenchReward().score(prediction, target, {"question_type": kind})


_THOUGHT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def think_then_answer(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward of form beside it: 1 for ``<think>…</think><answer>…</answer>`` and nothing else, for models that learned to write so."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(_THOUGHT.fullmatch(text) is not None) for text in texts]
