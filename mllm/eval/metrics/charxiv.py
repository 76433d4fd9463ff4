"""What can be said about CharXiv answers without its judge?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.relaxed import quantities
from mllm.eval.metrics.text import collapse, references


class CharXivProxy(Metric):
    """CharXiv is scored by gpt-4o-2024-05-13; this is an offline stand-in and its numbers are not CharXiv scores."""

    name = "charxiv_proxy"
    version = "2"
    protocol = "NOT the CharXiv score (a judge gives that): equality of normalised text, or of exact numbers, offline"

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = self._normalise(prediction)
        if not answer:
            return Score(None, "", "empty")
        numbers = quantities(answer)
        for reference in map(self._normalise, references(target)):
            wanted = quantities(reference)
            if numbers and wanted:
                for given, goal in itertools.product(numbers, wanted):
                    if given.value == goal.value and (given.unit == goal.unit or not given.unit or not goal.unit):
                        return Score(1.0, answer, "equal number" + (f" ({given.how})" if given.how else ""))
            elif answer == reference:
                return Score(1.0, answer, "equal text")
        return Score(0.0, answer, "different")

    @staticmethod
    def _normalise(text: str) -> str:
        return collapse(text.lower()).strip(" .\"'`*$")
