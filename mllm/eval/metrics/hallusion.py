"""How much of what a model affirms is not in the picture (HallusionBench, AMBER)?"""

from __future__ import annotations

from collections.abc import Sequence

from mllm.eval.metrics.base import Scored, mean
from mllm.eval.metrics.groups import all_right, whole_groups
from mllm.eval.metrics.yes_no import PopeStrict, gold_yes


class HallusionBench(PopeStrict):
    """``meta.figure`` joins the questions on one figure, ``meta.question_pair`` one question over its figures. Headline:
    aAcc; ``fAcc`` and ``qAcc`` count figures and questions with every answer right; ``mean`` is the mean of the three."""

    name = "hallusionbench"
    group_key = "set"
    protocol = (
        "HallusionBench by rule (the paper has GPT-4 grade): exactly one of the words yes and no, else unparsed; aAcc of "
        "questions, fAcc of figures, qAcc of questions over their figures"
    )
    example = ("yes", {"figure": "0", "question_pair": "0", "set": "0"})

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        figures, pairs = whole_groups(items, "figure"), whole_groups(items, "question_pair")
        parts = [
            self.scale * mean(values) for values in ([i.value for i in items], all_right(figures), all_right(pairs))
        ]
        result = {"score": parts[0], "fAcc": parts[1], "qAcc": parts[2], "mean": mean(parts)}
        categories: dict[str, list[float]] = {}
        for item in items:
            categories.setdefault(str(item.meta.get("category") or ""), []).append(item.value)
        return result | {name: self.scale * mean(values) for name, values in categories.items() if name}


class Amber(PopeStrict):
    """AMBER's discriminative part: ``no`` is the class that is looked for. Headline: F1 over all questions; each dimension
    (``meta.category``) has its own, and ``average_accuracy`` is the mean of the dimensions' accuracies."""

    name = "amber"
    group_key = None
    protocol = (
        "AMBER, discriminative: exactly one of the words yes and no (the published script wants the bare word), else "
        "unparsed; F1 with 'no' as the positive class"
    )

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        dimensions: dict[str, list[Scored]] = {}
        for item in items:
            dimensions.setdefault(str(item.meta.get("category") or ""), []).append(item)
        whole = self._counts(items)
        result = {"score": whole["f1"]} | {name: value for name, value in whole.items() if name != "f1"}
        result["average_accuracy"] = mean([self._counts(group)["accuracy"] for group in dimensions.values()])
        for name, group in dimensions.items():
            if name:
                result |= {f"{name}/{key}": value for key, value in self._counts(group).items()}
        return result

    @staticmethod
    def _counts(items: Sequence[Scored]) -> dict[str, float]:
        if not items:
            return dict.fromkeys(("f1", "accuracy", "precision", "recall"), float("nan"))
        answered_no = [item.score.parts.get("said_yes") == 0.0 for item in items]
        absent = [not gold_yes(item.target) for item in items]
        hits = sum(no and gone for no, gone in zip(answered_no, absent))
        precision = hits / sum(answered_no) if any(answered_no) else 0.0
        recall = hits / sum(absent) if any(absent) else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        accuracy = mean([item.value for item in items])
        values = {"f1": f1, "accuracy": accuracy, "precision": precision, "recall": recall}
        return {name: 100 * value for name, value in values.items()}
