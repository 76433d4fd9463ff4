"""How much of what a model affirms is not in the picture (HallusionBench, AMBER)?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm.eval.metrics.base import Scored, group_means, mean, ratio
from mllm.eval.metrics.groups import all_right, whole_groups
from mllm.eval.metrics.yes_no import PopeStrict, said_and_wanted, yes_no_counts


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

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return "", (1.0, item.value)

    def headline(self, parts: np.ndarray) -> float:
        return self.scale * mean(ratio(*parts[:, ::-1].T))

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        figures, pairs = whole_groups(items, "figure"), whole_groups(items, "question_pair")
        parts = [
            self.scale * mean(values) for values in ((i.value for i in items), all_right(figures), all_right(pairs))
        ]
        result = {"score": parts[0], "fAcc": parts[1], "qAcc": parts[2], "mean": mean(parts)}
        return result | {name: value for name, value in group_means(items, "category", self.scale).items() if name}


class Amber(PopeStrict):
    """AMBER's discriminative part: ``no`` is the class that is looked for. Headline: F1 over all questions; each dimension
    (``meta.category``) has its own, and ``average_accuracy`` is the mean of the dimensions' accuracies."""

    name = "amber"
    group_key = None
    protocol = (
        "AMBER, discriminative: exactly one of the words yes and no (the published script wants the bare word), else "
        "unparsed; F1 with 'no' as the positive class"
    )

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return "", said_and_wanted(item, "no")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        whole, dimensions = yes_no_counts(items, "no")
        for counts in (whole, *dimensions.values()):
            del counts["said"]
        result = {"score": whole.pop("f1")} | whole
        result["average_accuracy"] = mean(counts["accuracy"] for counts in dimensions.values())
        return result | {
            f"{name}/{key}": value for name, counts in dimensions.items() if name for key, value in counts.items()
        }
