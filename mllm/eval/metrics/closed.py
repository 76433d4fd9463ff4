"""Is a short answer equal to the expected one (GQA and plain exact match)?"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.text import collapse, references, rouge_l

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Equality(Metric):
    def normalise_prediction(self, text: str) -> str:
        raise NotImplementedError

    def normalise_target(self, text: str) -> str:
        return self.normalise_prediction(text)

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = self.normalise_prediction(prediction)
        found = answer in {self.normalise_target(reference) for reference in references(target)}
        return Score(float(found), answer, "equal" if found else "different")


class GqaLlava(_Equality):
    name = "gqa_llava"
    protocol = "GQA as LLaVA scores it: trailing periods off, lower case, equal to the answer as it stands"

    def normalise_prediction(self, text: str) -> str:
        return text.rstrip(".").lower()

    def normalise_target(self, text: str) -> str:
        return text


class GqaLmmsEval(_Equality):
    name = "gqa_lmms_eval"
    protocol = "GQA as lmms-eval scores it: case and all ASCII punctuation ignored on both sides"

    def normalise_prediction(self, text: str) -> str:
        return text.strip().lower().translate(_NO_PUNCTUATION)


class ExactMatch(_Equality):
    name = "exact_match"
    protocol = "equality after lower case, whitespace collapsed and trailing periods off, on both sides"

    def normalise_prediction(self, text: str) -> str:
        return collapse(text.lower()).rstrip(". ")


class RougeL(Metric):
    name = "rouge_l"
    protocol = (
        "F1 of the longest common subsequence of words with the nearest reference (not stemmed, 600 words): an offline "
        "stand-in for open answers, no benchmark's own score"
    )
    binary = False

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        value = max(rouge_l(prediction, reference) for reference in references(target))
        return Score(value, collapse(prediction)[:200], "words in order")
