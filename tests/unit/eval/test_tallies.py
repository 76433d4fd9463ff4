"""Totals that are no means, drawn by sums: the same numbers as going through the samples at every draw."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mllm.eval.metrics import METRICS, build_metric
from mllm.eval.report.columns import Clusters, ScoredItems, Taken
from mllm.eval.report.results import metric_result, statistic_of
from mllm.eval.report.statistics import bootstrap_estimate, paired_bootstrap, standard_error
from mllm.eval.report.tallies import bootstrap_tallies, paired_tallies

_STEPS = ("2steps_1", "2steps_2", "2steps_multi", "3steps_1", "3steps_2", "3steps_3", "3steps_multi")
_SPAR = ("depth_prediction_oc", "distance_prediction_oo", "obj_spatial_relation_oo", "view_change_infer")
_VSI = ("object_counting", "object_rel_direction_easy", "object_rel_direction_hard", "route_planning")
OPTIONS = {"psnr": {"data_range": 255}, "ssim": {"data_range": 255}}


def facts_of(name, metric, count, seed):
    """Samples as the rule's tasks have them: pairs and groups that lack some, unparsed answers, empty categories."""
    from mllm.eval.metrics import Score

    dice = random.Random(seed)
    for k in range(count):
        if k % 11 == 3:
            continue  # its group is not whole
        unit = k // 7 if name == "wemath" else k // 4 if metric.group_key == "group" else k // 2
        meta = {
            "category": f"kind {unit % 3}",
            "options": ["a", "b", "c", "d"],
            "group": k // 4,
            "place": k % 4,
            "pass": k % 4,
        }
        meta |= {
            "pair": k // 2,
            "set": k // 6,
            "figure": k // 3,
            "question_pair": k // 2,
            "problem": k // 7,
            "key": _STEPS[k % 7],
        }
        meta |= {"kind": "Acc+" if unit % 3 else "NQA", "task": _SPAR[k % 4], "question_type": _VSI[k % 4]}
        meta |= {"source": ("ADE20K", "COCO", "Omni3D")[k % 3], "chart": f"chart {unit % 2}", "clip": k // 5}
        value = float(dice.random() < 0.7)
        parts = {"said_yes": float(dice.random() < 0.6), "intersection": 40 * value + k % 5, "union": 60.0 + k % 7}
        parts |= {"dice": 0.5, "no_target": float(k % 9 == 0), "no_mask": 0.0}
        if name == "psnr":
            value = float("inf") if k % 13 == 0 else 20 + dice.random()
        elif not metric.binary:
            value = dice.random()
        unread = dice.random() < 0.05 and name != "mask_iou"
        score = Score(None) if unread else Score(value, "A", "rule", parts)
        yield {"id": str(k), "meta": meta}, (score, "yes" if k % 2 else "no", meta)


def items_of(name, seed=0, count=240):
    metric = build_metric({"name": name, **OPTIONS[name]}) if name in OPTIONS else build_metric(name)
    items, clusters = ScoredItems(metric), Clusters(metric)
    for row, facts in facts_of(name, metric, count, seed):
        items.append(row["id"], facts)
        clusters.append(row)
    return metric, items, clusters.codes()


def no_means():
    return [name for name in METRICS if not METRICS.get(name).is_mean]


def test_every_total_that_is_no_mean_is_drawn_by_sums_as_it_is_by_samples():
    names = no_means()
    assert {"pope_official", "letter_groups", "mme", "mask_iou", "wemath", "psnr", "vsibench"} <= set(names)
    for name in names:
        metric, items, codes = items_of(name)
        drawn = items.drawn(codes)
        assert drawn is not None, f"{name} has no counts"
        assert drawn.headline() == pytest.approx(metric.aggregate(items)["score"], rel=1e-12), name
        slow = bootstrap_estimate(statistic_of(metric, list(items)), codes, repeats=20, seed=3)
        fast = bootstrap_tallies(drawn, repeats=20, seed=3)
        for field in ("value", "standard_error", "low", "high"):
            assert getattr(fast, field) == pytest.approx(getattr(slow, field), rel=1e-9), (name, field)
        assert (fast.method, fast.num_clusters, fast.num_samples) == (slow.method, slow.num_clusters, slow.num_samples)

        some = np.flatnonzero(np.isin(codes, np.unique(codes)[::3]))
        part = Taken(items, some).drawn(codes[some])
        assert part.headline() == pytest.approx(metric.aggregate([items[int(k)] for k in some])["score"], rel=1e-12), (
            name
        )

        _, others, _ = items_of(name, seed=1)
        paired = paired_bootstrap(statistic_of(metric, items), statistic_of(metric, others), codes, repeats=20, seed=4)
        quick = paired_tallies(drawn, others.drawn(codes), repeats=20, seed=4)
        assert quick.difference == pytest.approx(paired.difference, rel=1e-9, abs=1e-9), name
        assert (quick.p_value, quick.method) == (paired.p_value, paired.method), name


def test_groups_that_lie_in_several_clusters_are_drawn_by_samples():
    _, items, _ = items_of("letter_groups")
    assert items.drawn(np.arange(len(items))) is None


def test_a_metric_of_the_user_without_counts_is_told_of_random_groups_where_there_are_very_many():
    generator = np.random.default_rng(0)
    gold, said = generator.random(60_000) < 0.3, generator.random(60_000) < 0.4
    calls = []

    def f1(positions):
        calls.append(len(positions))
        both = (gold[positions] & said[positions]).sum()
        return 100 * 2 * both / (gold[positions].sum() + said[positions].sum())

    quick = bootstrap_estimate(f1, np.arange(60_000), repeats=200)
    assert len(calls) == 201 and sum(calls) == 120_000, "once as a whole, once in groups"
    assert quick.method == "200 random groups, seed 0" and quick.value == f1(np.arange(60_000))
    draws = [f1(generator.integers(0, 60_000, 60_000)) for _ in range(200)]
    assert quick.standard_error == pytest.approx(np.std(draws, ddof=1), rel=0.25)
    assert quick.high - quick.value == pytest.approx(1.972 * quick.standard_error, rel=1e-3), "Student's t, 199 degrees"

    pictures = np.repeat(np.arange(6_000), 10)  # whole pictures go together
    same = np.repeat(generator.random(6_000), 10)
    grouped = bootstrap_estimate(lambda k: float(same[k].mean()), pictures, repeats=200)
    assert grouped.num_clusters == 6_000 and grouped.method == "200 random groups of clusters, seed 0"
    assert grouped.standard_error == pytest.approx(standard_error(same[::10]), rel=0.25), "not a tenth of the variance"
    few = bootstrap_estimate(lambda k: float(same[k].mean()), np.repeat(np.arange(6), 10_000), repeats=20)
    assert few.method == "cluster bootstrap, 20 draws, seed 0"


def test_a_difference_over_random_groups_has_an_honest_p():
    generator = np.random.default_rng(1)
    first, second = generator.random(60_000), generator.random(60_000)
    equal = paired_bootstrap(lambda k: first[k].mean(), lambda k: second[k].mean(), np.arange(60_000), repeats=50)
    assert equal.low < 0 < equal.high and equal.p_value > 0.05 and equal.method == "paired 200 random groups, seed 0"
    better = paired_bootstrap(
        lambda k: first[k].mean(), lambda k: (second + 0.02)[k].mean(), np.arange(60_000), repeats=50
    )
    assert better.low > 0 and better.p_value < 1e-6


def test_mme_of_exactly_a_hundred_points_is_no_percentage():
    rows = []
    metric = build_metric("mme")
    for k in range(40):
        score = {"value": float(k % 4 < 2), "extracted": "yes", "rule": "", "parts": {}}
        rows.append({
            "id": str(k), "output": "yes", "target": "yes", "meta": {"category": "count", "pair": k // 2},
            "scores": {metric.label: score},
        })  # fmt: skip
    result = metric_result(metric, rows)
    assert result.value == 100.0 and "Wilson" not in result.method and result.low < 100 < result.high
