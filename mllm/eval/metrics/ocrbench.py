"""Does a reply contain the text that OCRBench asks for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, group_means
from mllm.eval.metrics.text import references

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


class OcrBench(Metric):
    """``meta.dataset`` tells HME100k (mathematics: case counts, spaces do not). Headline: points of 1000.

    fold_full_width: read full-width ASCII as ASCII, as lmms-eval does.
    """

    name = "ocrbench"
    protocol = (
        "OCRBench: right if a reference is a substring of the reply (lower case; HME100k with case, without spaces)"
    )
    scale = 1000.0
    unit = "of 1000"

    def __init__(self, fold_full_width: bool = False):
        self.fold_full_width = fold_full_width

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        formula = str(meta.get("dataset")) == "HME100k"
        answer = self._normalise(prediction, formula)
        wanted = [text for text in (self._normalise(reference, formula) for reference in references(target)) if text]
        if not wanted:
            raise DataError(f"target {target!r} is empty; an empty reference would match every reply")
        found = any(text in answer for text in wanted)
        return Score(float(found), answer, "formula, substring" if formula else "substring")

    def _normalise(self, text: str, formula: bool) -> str:
        if self.fold_full_width and not formula:
            text = text.translate(_FULL_WIDTH)
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        points = {"points": sum(item.value for item in items)}
        return super().aggregate(items) | points | group_means(items, "question_type", 100.0)
