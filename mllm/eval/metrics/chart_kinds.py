"""How do ChartBench and EvoChart-QA score an answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
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

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        pairs: dict[str, list[Scored]] = {}
        numbers = [item for item in items if item.meta.get("kind") != "Acc+"]
        for item in items:
            if item.meta.get("kind") == "Acc+":
                pairs.setdefault(str(item.meta.get("pair")), []).append(item)
        whole = [pair for pair in pairs.values() if len(pair) == 2]
        plus = [
            Scored(pair[0].id, Score(float(all(item.value == 1 for item in pair))), None, pair[0].meta)
            for pair in whole
        ]
        same = [float(len({item.score.parts.get("said_yes") for item in pair}) == 1) for pair in whole]
        joined = [*plus, *numbers]
        result = {
            "score": self.scale * mean([item.value for item in joined]) if joined else (0.0 if items else float("nan"))
        }
        if whole:
            result |= {
                "acc_plus": self.scale * mean([item.value for item in plus]),
                "confused": self.scale * mean(same),
            }
        if numbers:
            result["nqa"] = self.scale * mean([item.value for item in numbers])
        result["odd_pairs"] = float(len(pairs) - len(whole))
        return result | group_means(joined, "category", self.scale) | group_means(joined, "chart", self.scale)


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
