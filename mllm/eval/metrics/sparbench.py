"""How does SPAR-Bench score choices, distances and camera moves?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean, means_by
from mllm.eval.metrics.text import plain_float, references
from mllm.eval.metrics.vsibench import mean_relative_accuracy

_CHOICES = frozenset({
    "obj_spatial_relation_oo", "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv", "spatial_imagination_oc",
    "spatial_imagination_oo", "spatial_imagination_oc_mv", "spatial_imagination_oo_mv", "position_matching",
    "camera_motion_infer", "distance_infer_center_oo", "distance_infer_center_oo_mv",
})  # fmt: skip
_NUMBERS = frozenset(
    f"{what}_prediction_{who}{views}" for what in ("depth", "distance") for who in ("oc", "oo") for views in ("", "_mv")
)
_MOVE = "view_change_infer"
_MIDDLE = {_MOVE, "position_matching", "camera_motion_infer"}
_AXES = (
    ("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"), ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
)  # fmt: skip
_DIGITS = re.compile(r"(?<!\^)\d++(?:\.\d++)?")
_READ = 4_000


def moves(text: str) -> list[float] | None:
    """Five signed amounts of ``move_right:0.2,rotate_up:10``: right, up, forward, turn right, turn up; None when it does not
    read so."""
    amounts: dict[str, float] = {}
    for part in text.strip().split(","):
        name, colon, amount = part.partition(":")
        number = plain_float(amount)
        if not colon or number is None:
            return None
        amounts[name.strip()] = number
    return [amounts.get(more, 0.0) - amounts.get(less, 0.0) for more, less in _AXES]


class SparBench(Metric):
    """``meta.task`` chooses the rule. Headline: mean over the tasks that occur; ``low``, ``middle``, ``high`` are the means over
    the tasks of each level."""

    name = "sparbench"
    protocol = (
        "SPAR-Bench: choices by equality, or the first character; numbers and camera moves by mean relative accuracy (of "
        "several views the last number, else the first); mean of tasks. The published script also takes any part of the "
        "answer's text for the answer, an empty reply too: here that is unparsed or wrong"
    )
    binary = False
    is_mean = False
    example = ("3", {"task": "depth_prediction_oc"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        task, wanted = _task(meta), references(target)[0].strip()
        text = prediction.strip()
        if not text:
            return Score(None, "", "empty")
        if task in _CHOICES:
            right = text.lower() == wanted.lower() or (len(wanted) == 1 and text[0].lower() == wanted.lower())
            return Score(float(right), text[:40], "equal or first character")
        if task == _MOVE:
            given, goal = moves(text[:_READ]), moves(wanted)
            if goal is None:
                raise DataError(f"target {target!r} of {_MOVE} is no list of moves")
            if given is None:
                return Score(None, text[:40], "no list of moves")
            return Score(mean([mean_relative_accuracy(p, t) for p, t in zip(given, goal)]), text[:40], "moves")
        truth, numbers = plain_float(wanted), _DIGITS.findall(text[-_READ:] if task.endswith("_mv") else text[:_READ])
        if truth is None:
            raise DataError(f"target {target!r} of a {task} question is not a number")
        if not numbers:
            return Score(None, "", "no number")
        number = numbers[-1] if task.endswith("_mv") else numbers[0]
        return Score(mean_relative_accuracy(float(number), truth), number, "mean relative accuracy")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return _task(item.meta), (1.0, item.value)

    def headline(self, parts: np.ndarray) -> float:
        count, total = parts[parts[:, 0] > 0].T
        return self.scale * mean(total / count)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        each = means_by(((_task(item.meta), item.value) for item in items), self.scale)
        levels: dict[str, list[float]] = {}
        for task, value in each.items():
            level = "low" if task in _NUMBERS else "middle" if task in _MIDDLE else "high"
            levels.setdefault(level, []).append(value)
        return {"score": mean(list(each.values()))} | {name: mean(values) for name, values in levels.items()} | each


def _task(meta: Mapping[str, Any]) -> str:
    task = str(meta.get("task"))
    if task not in _CHOICES and task not in _NUMBERS and task != _MOVE:
        raise DataError(f"task {task!r} is none of SPAR-Bench's")
    return task
