"""Does scoring a reply take time in proportion to its length, whatever it is made of?"""

from __future__ import annotations

import time

import pytest

from mllm.eval.metrics import METRICS, build_metric
from mllm.testing.metrics import SECONDS_PER_MEGABYTE, check_time

OPTIONS = {"options": ["12", "15", "a red car", "21"]}
CHOICE = ("A", OPTIONS)
SAMPLES = {
    "amber": ("yes", {}),
    "hallusionbench": ("yes", {}),
    "mmfr": ("fake", {}),
    "naturalbench": ("yes", {}),
    "ocrbench_v2": ("5", {"type": "text recognition en"}),
    "sparbench": ("5", {"task": "depth_prediction_oc"}),
    "wemath": CHOICE,
    "box_iou": ([1, 2, 3, 4], {"width": 100, "height": 50}),
    "mathvista": ("5", {"question_type": "free_form", "answer_type": "float", "precision": 1}),
    "mmbench_circular": CHOICE,
    "mmmu": ("5", {"question_type": "open"}),
    "mmmu_lmms_eval": ("A", {**OPTIONS, "question_type": "multiple-choice"}),
    "mmmu_pro": ("A", {**OPTIONS, "question_type": "multiple-choice"}),
    "mme": ("yes", {}),
    "pope_official": ("yes", {}),
    "pope_strict": ("yes", {}),
    "vsibench": ("5", {"question_type": "object_counting"}),
    "vsibench_reward": ("5", {"question_type": "object_counting"}),
}
TEXT_METRICS = [name for name in METRICS if METRICS.get(name).reads_text]


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_megabyte_is_scored_in_seconds(name):
    metric = build_metric(name)
    target, meta = CHOICE if name.startswith("letter") else SAMPLES.get(name, ("5", {}))
    check_time(metric, (target, meta), sizes=(1_000_000,))


def test_rows_of_a_table_that_all_differ_are_matched_in_linear_time():
    """Every row is a key of its own, compared with every key of the target."""
    target = "year | sales | cost\n" + "\n".join(f"{1990 + k} | {3 * k} | {7 * k}" for k in range(20))
    reply = "year | sales | cost\n" + "\n".join(f"{k} | {k} | {k}" for k in range(14_000))
    for name in ("rms_f1", "rnss"):
        metric, start = build_metric(name), time.process_time()
        metric.score(reply, target, {})
        assert time.process_time() - start < 0.5 + SECONDS_PER_MEGABYTE * len(reply) / 1e6
