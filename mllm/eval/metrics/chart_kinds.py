"""How do ChartBench and EvoChart-QA score an answer?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
from mllm.eval.metrics.groups import all_right, as_samples, whole_groups
from mllm.eval.metrics.relaxed import strict_match
from mllm.eval.metrics.text import collapse, plain_float, references
from mllm.eval.metrics.yes_no import gold_yes


class ChartBench(Metric):
    """Two statements on one fact, the first true: ``meta.pair`` joins them. Questions with ``meta.kind`` ``NQA`` stand alone.
    Headline: percent of pairs and numbers right; ``acc_plus`` of pairs, ``nqa`` of numbers, ``confused`` the percent of pairs
    with the same answer to both."""

    name = "chartbench"
    group_key = "pair"
    protocol = (
        "ChartBench: a reply with 'yes' in it says yes, any other no; a pair is right when both are (Acc+); numbers within "
        "5 % of the target, or of a hundredth of a percentage (the paper has a model cut the number out of the reply first)"
    )
    is_mean = False
    example = ("yes", {"kind": "Acc+", "pair": "0"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        if meta.get("kind") != "Acc+":
            return self._number(prediction.strip(), target)
        yes = "yes" in prediction.lower()
        rule = "holds yes" if yes else "holds no yes"
        return Score(float(yes == gold_yes(target)), "yes" if yes else "no", rule, {"said_yes": float(yes)})

    @staticmethod
    def _number(answer: str, target: Any) -> Score:
        value = plain_float(answer.rstrip("%"))
        for reference in references(target):
            wanted = plain_float(reference.rstrip("%"))
            if value is None or wanted is None:
                if answer.lower() == reference.lower():
                    return Score(1.0, answer, "equal text")
                continue
            for goal in (wanted, wanted / 100) if reference.endswith("%") else (wanted,):
                if abs(value - goal) <= 0.05 * abs(goal):
                    return Score(1.0, answer, "number within 5%")
        return Score(0.0, answer, "different") if answer else Score(None, "", "empty")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        right, paired = float(item.value == 1), float(_paired(item))
        return "", (paired, paired * right, 1 - paired, (1 - paired) * item.value)

    def joined(self, sums: np.ndarray) -> np.ndarray:
        asked, right, numbers, near = sums.T
        pairs = asked == 2
        return np.stack([pairs + numbers, (pairs & (right == 2)) + near, np.ones(len(sums))], axis=1)

    def headline(self, parts: np.ndarray) -> float:
        counted, right, samples = parts.sum(axis=0)
        return float(self.scale * right / counted) if counted else (0.0 if samples else float("nan"))

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        pairs = whole_groups((item for item in items if _paired(item)), "pair", noted=_noted, alone=True)
        whole = {name: pair for name, pair in pairs.items() if pair.size == 2}
        said: dict[str, int] = {}  # one bit for each answer that was given: both the same leave one
        for item in items:
            if _paired(item) and (name := str(item.meta.get("pair", item.id))) in whole:
                said[name] = said.get(name, 0) | _BITS[item.score.parts.get("said_yes")]
        numbers = mean(item.value for item in items if not _paired(item))

        def joined() -> Iterator[Scored]:
            return itertools.chain(as_samples(whole), (item for item in items if not _paired(item)))

        total = self.scale * mean(item.value for item in joined())
        result = {"score": 0.0 if items and math.isnan(total) else total}
        if whole:
            result["acc_plus"] = self.scale * mean(all_right(whole))
            result["confused"] = self.scale * mean(float(bits.bit_count() == 1) for bits in said.values())
        if not math.isnan(numbers):
            result["nqa"] = self.scale * numbers
        result["odd_pairs"] = float(len(pairs) - len(whole))
        return result | group_means(joined(), "category", self.scale) | group_means(joined(), "chart", self.scale)


_BITS = {None: 1, 0.0: 2, 1.0: 4}


def _paired(item: Scored) -> bool:
    return item.meta.get("kind") == "Acc+"


def _noted(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta.get(key) for key in ("category", "chart")}


class EvoChart(Metric):
    name = "evochart"
    protocol = (
        "EvoChart-QA: equal text where the answer stands in the chart (is_clear), else within 5 % by our strict rule; case, "
        "outer spaces and a trailing period do not count"
    )
    example = ("5", {"is_clear": False})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = collapse(prediction.lower()).rstrip(".")
        if not answer:
            return Score(None, "", "empty")
        if meta.get("is_clear"):
            found = answer in {collapse(reference.lower()).rstrip(".") for reference in references(target)}
            return Score(float(found), answer, "equal text" if found else "different")
        rule = ""
        for reference in references(target):
            right, rule = strict_match(reference, prediction)
            if right:
                return Score(1.0, answer, rule)
        return Score(0.0, answer, rule)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        return super().aggregate(items) | group_means(items, "kind", self.scale)
