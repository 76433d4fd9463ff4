"""What do answers cost, how often do they decline, and is the model's confidence right?"""

from __future__ import annotations

import math

import pytest

from mllm.eval.report.facts import Calibration, FactSums


def error_of(confidences, values) -> float:
    calibration = Calibration()
    for confidence, value in zip(confidences, values, strict=True):
        calibration.append(confidence, value)
    return calibration.error


def test_calibration_error_worked_by_hand():
    """Two answers in the part from 0.8 to 0.9 (confidence 0.85 on the mean, half right), two from 0.1 to 0.2 (0.1, none right):
    (2 · |0.85 − 0.5| + 2 · |0.1 − 0|) / 4 = 0.225."""
    assert error_of([0.82, 0.88, 0.1, 0.1], [1, 0, 0, 0]) == pytest.approx(0.225)
    assert error_of([1.0, 1.0], [1, 1]) == 0.0, "a confidence of 1 belongs to the last part"


def test_facts_of_a_tasks_answers():
    def row(output, tokens, value, confidence, **more):
        scores = {"m v1": {"value": value, "extracted": "", "rule": ""}}
        return {"output": output, "num_tokens": tokens, "num_prompt_tokens": 10, "scores": scores,
                "logprob": math.log(confidence), **more}  # fmt: skip

    rows = [
        row("4", 2, 1.0, 0.85),
        row("I'm sorry, I can't read it.", 8, None, 0.15),
        row("5", 2, 0.0, 0.9, error="lost"),
        row("", 0, 0.0, 0.9, unusable="no picture"),
    ]

    def facts_of(header):
        sums = FactSums("m v1")
        for row in rows:
            sums.append(row)
        return sums.result(header)

    facts = facts_of({"seconds": 3.0, "answered": 6})
    assert (facts.tokens, facts.prompt_tokens, facts.milliseconds, facts.refused) == (5.0, 10.0, 500.0, 0.5)
    assert facts.confidence == pytest.approx(0.5) and facts.calibration_error == pytest.approx((0.15 + 0.15) / 2)
    for gone in rows:
        del gone["logprob"]
    silent = facts_of({})
    assert silent.milliseconds is None and silent.confidence is None and silent.calibration_error is None
