"""Do our formulas agree with statsmodels?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from mllm.errors import DataError
from mllm.eval.report import statistics
from mllm.eval.report.statistics import (
    bootstrap_estimate,
    clustered_standard_error,
    holm,
    mcnemar_exact,
    mean_estimate,
    paired_bootstrap,
    paired_comparison,
    standard_error,
    wilson_interval,
)


@pytest.fixture
def clustered():
    generator = np.random.default_rng(0)
    clusters = generator.integers(0, 25, 200)
    values = (generator.random(200) + 0.6 * generator.standard_normal(25)[clusters] > 0.5).astype(float)
    return values, clusters.tolist()


def test_clustered_standard_error_is_statsmodels_cluster_robust_one(clustered):
    import statsmodels.api as sm

    values, clusters = clustered
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": np.array(clusters)})
    assert clustered_standard_error(values, clusters) == pytest.approx(float(fit.bse[0]), rel=1e-12)


def test_standard_error_is_statsmodels(clustered):
    from statsmodels.stats.weightstats import DescrStatsW

    assert standard_error(clustered[0]) == pytest.approx(DescrStatsW(clustered[0]).std_mean)


def test_millers_form_adds_the_cross_terms_and_one_cluster_tells_nothing():
    values, clusters = [1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"]
    errors = np.array(values) - 0.75
    cross = 2 * (errors[0] * errors[1] + errors[2] * errors[3]) / 16
    expected = np.var(values, ddof=1) / 4 + cross
    assert clustered_standard_error(values, clusters, form="miller") == pytest.approx(math.sqrt(expected))
    opposed = clustered_standard_error([1.0, 0.0, 1.0, 0.0], list("aabb"), form="miller")
    assert opposed == pytest.approx(math.sqrt(1 / 12 - 1 / 16))
    assert math.isnan(clustered_standard_error([1.0, 0.0], ["a", "a"]))


def test_singletons_make_the_sandwich_the_plain_standard_error():
    values = [0.0, 1.0, 1.0, 0.5, 0.2]
    assert clustered_standard_error(values, list("abcde")) == pytest.approx(standard_error(values))


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (3, 10), (120, 130), (1, 1)])
def test_wilson_interval_is_statsmodels(successes, total):
    from statsmodels.stats.proportion import proportion_confint

    assert wilson_interval(successes, total) == pytest.approx(
        proportion_confint(successes, total, method="wilson"), abs=1e-9
    )


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 12), (0, 8)])
def test_mcnemar_is_statsmodels_exact_test(b, c):
    from statsmodels.stats.contingency_tables import mcnemar

    assert mcnemar_exact(b, c) == pytest.approx(mcnemar([[3, b], [c, 4]], exact=True).pvalue)


def test_holm_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = [0.01, 0.04, 0.03, 0.5, 0.001]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_intervals_of_all_right_answers_are_not_points():
    estimate = mean_estimate([1.0] * 50, binary=True)
    assert estimate.low == pytest.approx(0.9287, abs=1e-3) and estimate.high == 1.0
    few = mean_estimate([1.0] * 50, binary=True, clusters=[k // 10 for k in range(50)])
    assert few.low < 0.6 and few.num_clusters == 5


def test_clustering_widens_the_interval(clustered):
    values, clusters = clustered
    alone, together = mean_estimate(values, binary=True), mean_estimate(values, binary=True, clusters=clusters)
    assert together.standard_error > alone.standard_error
    assert together.high - together.low > alone.high - alone.low and together.num_clusters == 25
    assert mean_estimate([], binary=True).num_samples == 0


def test_cluster_bootstrap_of_a_mean_finds_the_sandwich(clustered):
    values, clusters = clustered
    estimate = bootstrap_estimate(lambda k: float(values[k].mean()), clusters, repeats=2000, seed=1)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.standard_error == pytest.approx(clustered_standard_error(values, clusters), rel=0.1)
    again = bootstrap_estimate(lambda k: float(values[k].mean()), clusters, repeats=2000, seed=1)
    assert again == estimate


def test_the_interval_of_none_or_all_right_ends_there_exactly():
    for count in (6, 12, 359, 600):
        assert wilson_interval(0, count)[0] == 0.0 and wilson_interval(count, count)[1] == 1.0


def test_many_answers_take_the_short_way_to_the_same_numbers(monkeypatch):
    """Above some size McNemar's sum goes by logarithms, and a bootstrap draws how often each kind of cluster comes."""
    exact = [mcnemar_exact(*counts) for counts in ((0, 3), (5, 5), (400, 460), (480, 470))]
    draw = np.random.default_rng(2)
    a, b, clusters = draw.integers(0, 2, 900), draw.integers(0, 2, 900), np.arange(900) // 3
    usual = [paired_comparison(a, b, clusters=names, repeats=4000) for names in (None, clusters)]
    monkeypatch.setattr(statistics, "_EXACT", 1)
    monkeypatch.setattr(statistics, "_MANY", 10)
    assert [mcnemar_exact(*counts) for counts in ((0, 3), (5, 5), (400, 460), (480, 470))] == pytest.approx(
        exact, rel=1e-9
    )
    for found, expected in zip(
        (paired_comparison(a, b, clusters=names, repeats=4000) for names in (None, clusters)), usual
    ):
        width = expected.high - expected.low
        assert found.low == pytest.approx(expected.low, abs=0.05 * width) and found != expected
        assert found.high == pytest.approx(expected.high, abs=0.05 * width) and found.p_value == pytest.approx(
            expected.p_value, abs=0.05
        )
        assert (found.difference, found.wins, found.num_clusters) == (
            expected.difference,
            expected.wins,
            expected.num_clusters,
        )


def test_paired_comparison_uses_mcnemar_for_independent_right_and_wrong():
    a, b = [1, 1, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0]
    result = paired_comparison(a, b, binary=True)
    assert result.p_value == pytest.approx(mcnemar_exact(1, 4)) and (result.wins, result.losses) == (4, 1)
    assert result.difference == pytest.approx(3 / 8) and "McNemar" in result.method and result.low < 3 / 8 < result.high


def test_paired_bootstrap_covers_and_is_seeded(clustered):
    values, clusters = clustered
    other = np.clip(values + (np.arange(200) % 7 == 0), 0, 1)
    result = paired_comparison(values, other, clusters=clusters, binary=True, seed=3)
    assert "cluster bootstrap" in result.method and result.low > 0 and result.p_value < 0.01
    assert result == paired_comparison(values, other, clusters=clusters, binary=True, seed=3)
    same = paired_comparison(values, values, clusters=clusters)
    assert same.difference == 0 and same.p_value == 1.0
    general = paired_bootstrap(lambda k: values[k].mean(), lambda k: other[k].mean(), clusters, repeats=1500, seed=3)
    assert general.difference == pytest.approx(result.difference) and general.low == pytest.approx(result.low, abs=0.02)


def test_unequal_lengths_are_refused():
    with pytest.raises(DataError, match="same samples"):
        paired_comparison([1.0], [1.0, 0.0])
    with pytest.raises(DataError, match="cluster names"):
        clustered_standard_error([1.0, 0.0], ["a"])


def test_partial_credit_near_0_and_1_stays_inside_and_is_no_point():
    nearly = mean_estimate([1.0] * 9 + [0.8])
    assert nearly.low < nearly.value < nearly.high <= 1 and nearly.method.startswith("Wilson")
    perfect, none = mean_estimate([1.0] * 10), mean_estimate([0.0] * 10)
    assert perfect.low == pytest.approx(1 - none.high) and 0.6 < perfect.low < 0.8
    middle = mean_estimate([0.2, 0.5, 0.7, 0.4, 0.6] * 4)
    assert middle.method.startswith("normal") and mean_estimate([20.0, 31.0]).method.startswith("normal")
