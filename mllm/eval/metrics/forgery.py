"""Is a forged picture found, and is the reasoning like the reference's (MMFR)?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Mean, Metric, Score, Scored
from mllm.eval.metrics.text import references, rouge_l, tagged


def bleu_1(reply: str, reference: str) -> float:
    """Share of the reply's words that the reference has (each as often as there), times the brevity penalty."""
    given, wanted = reply.split(), reference.split()
    if not given:
        return 0.0
    same = sum((Counter(given) & Counter(wanted)).values())
    return same / len(given) * min(1.0, math.exp(1 - len(wanted) / len(given)))


class Mmfr(Metric):
    """``meta.reasoning``: the reference text. Headline: accuracy, a reply out of form wrong. ``accuracy_of_read`` leaves those
    out, as the published script does; ``real`` and ``fake`` are the accuracies of each kind; ``average_precision`` is that of
    the hard decisions (a reply carries no probability)."""

    name = "mmfr"
    protocol = (
        "FakeReasoning's form: <REASONING>…</REASONING> and <CONCLUSION> This image is fake. (or real.) </CONCLUSION>; out of "
        "form is unparsed and wrong; reasoning by BLEU-1 and ROUGE-L (without stemming) of the replies in form"
    )
    example = ("fake", {"reasoning": "the light is odd"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        gold = references(target)[0].strip().lower()
        if gold not in ("real", "fake"):
            raise DataError(f"target {target!r} is neither real nor fake")
        conclusion, reasoning = tagged(prediction, "CONCLUSION"), tagged(prediction, "REASONING")
        if conclusion is None or reasoning is None:
            return Score(None, "", "no conclusion" if conclusion is None else "no reasoning")
        verdict = next((word for word in ("fake", "real") if f"This image is {word}." in conclusion), None)
        if verdict is None:
            return Score(None, "", "conclusion out of form")
        reference = str(meta.get("reasoning") or "")
        parts = {"bleu_1": bleu_1(reasoning, reference), "rouge_l": rouge_l(reasoning, reference)} if reference else {}
        return Score(float(verdict == gold), verdict, "conclusion", parts)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        read, counted = Mean(), 0
        words, kinds = {"bleu_1": Mean(), "rouge_l": Mean()}, {"real": Mean(), "fake": Mean()}
        for item in items:
            counted += 1
            kinds[references(item.target)[0].strip().lower()].append(item.value)
            if item.score.value is not None:
                read.append(item.value)
                for name, total in words.items():
                    if name in item.score.parts:
                        total.append(item.score.parts[name])
        result = super().aggregate(items) | {"failures": self.scale * (1 - read.count / counted) if counted else 0.0}
        if read.count:
            result["accuracy_of_read"] = self.scale * read.value
        told = (words | kinds).items()
        result |= {name: self.scale * total.value for name, total in told if total.count}
        return result | {"average_precision": self.scale * _hard_precision(items)}


def _hard_precision(items: Sequence[Scored]) -> float:
    """Average precision of the decisions 1 (said fake) and 0: precision at the calls, then the share of fakes for the rest."""
    fake = [references(item.target)[0].lower() == "fake" for item in items]
    called = [item.score.extracted == "fake" for item in items]
    if not any(fake):
        return 0.0
    hits = sum(f and c for f, c in zip(fake, called))
    recall = hits / sum(fake)
    precision = hits / sum(called) if any(called) else 0.0
    return recall * precision + (1 - recall) * sum(fake) / len(fake)
