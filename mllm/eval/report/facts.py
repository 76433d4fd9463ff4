"""What did answering cost, how often was an answer declined, and does the model know when it is right?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.eval.refusals import is_refusal

Row = Mapping[str, Any]
BINS = 10


@dataclass(frozen=True)
class AnswerFacts:
    """Beside a task's score; None: not measured. calibration_error: `Calibration.error` of the headline's verdicts."""

    tokens: float | None = None
    """New tokens per answer."""
    prompt_tokens: float | None = None
    milliseconds: float | None = None
    """Of one process per answer, everything counted: pictures read, generation, scoring."""
    refused: float | None = None
    """Share of answers that decline, 0 to 1."""
    confidence: float | None = None
    """Mean probability that the model gave its whole answer, 0 to 1."""
    calibration_error: float | None = None


class FactSums:
    """`AnswerFacts` of one task, told row by row. label: the headline metric's."""

    def __init__(self, label: str):
        self._label = label
        self._count = self._declined = 0
        self._sums = dict.fromkeys(("num_tokens", "num_prompt_tokens"), 0)
        self._calibration = Calibration()

    def append(self, row: Row) -> None:
        """One more row; those that were not asked or not answered do not count."""
        if row.get("unusable") or row.get("error"):
            return
        self._count += 1
        self._declined += refused(row)
        for key in self._sums:
            self._sums[key] += row.get(key) or 0
        entry = row.get("scores", {}).get(self._label)
        if row.get("logprob") is not None and entry is not None and "error" not in entry:
            self._calibration.append(math.exp(row["logprob"]), entry["value"] or 0.0)

    def result(self, header: Mapping[str, Any]) -> AnswerFacts:
        """Of the rows so far. header: says how long they took."""
        count, sure = self._count, self._calibration
        if not count:
            return AnswerFacts()
        seconds, timed = header.get("seconds"), header.get("answered")
        return AnswerFacts(
            tokens=self._sums["num_tokens"] / count or None,
            prompt_tokens=self._sums["num_prompt_tokens"] / count or None,
            milliseconds=1000 * seconds / timed if seconds and timed else None,
            refused=self._declined / count,
            confidence=sure.confidence if sure.count else None,
            calibration_error=sure.error if sure.count else None,
        )


class Calibration:
    """How far confidences are from being right, told one after another: sums of ``bins`` equal parts of 0 to 1."""

    def __init__(self, bins: int = BINS):
        self.count, self._total, self._gaps = 0, 0.0, [0.0] * bins

    def append(self, confidence: float, value: float) -> None:
        """One more answer. value: 1 right, 0 wrong, or between."""
        bins = len(self._gaps)
        self._gaps[min(int(confidence * bins), bins - 1)] += confidence - value
        self.count, self._total = self.count + 1, self._total + confidence

    @property
    def confidence(self) -> float:
        """The mean."""
        return self._total / self.count

    @property
    def error(self) -> float:
        """Mean distance between confidence and accuracy over the parts, weighted by their samples (Guo et al., arXiv 1706.04599,
        equation 3)."""
        return sum(map(abs, self._gaps)) / self.count


def refused(row: Row) -> bool:
    """Whether a row's answer declines."""
    return is_refusal(row["output"])
