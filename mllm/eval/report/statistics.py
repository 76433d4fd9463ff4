"""How sure is a score, and is one model better than another?

Formulas follow Miller, "Adding error bars to evals" (arXiv 2411.00640). Values are per-sample scores; clusters name
samples that share an image, a video or a scene and so are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm.errors import DataError

Z95 = 1.959963984540054
_REPEATS = 1000
_MANY, _FEW = 50_000, 4096
"""Of more clusters than the first, of at most so many kinds, a bootstrap draws how often each kind comes."""
_EXACT = 1000
_GROUPS, _FEWEST_GROUPS, _IN_A_GROUP = 200, 20, 20
"""A statistic of many samples is told of so many groups, no fewer than the second, of no fewer clusters each than the third."""
Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its uncertainty. method says how ``low`` and ``high`` (95 %) came about; num_clusters is None when
    every sample is its own cluster."""

    value: float
    standard_error: float
    low: float
    high: float
    num_samples: int
    num_clusters: int | None
    method: str


@dataclass(frozen=True)
class Comparison:
    """Model B minus model A on the same samples. wins: samples where B is better; losses: where A is."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int
    num_samples: int
    num_clusters: int | None
    method: str


def standard_error(values: Values) -> float:
    """s / √n with n - 1 in s; NaN below two samples."""
    array = np.asarray(values, float)
    return float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else float("nan")


def clustered_standard_error(
    values: Values, clusters: Clusters, *, form: Literal["sandwich", "miller"] = "sandwich"
) -> float:
    """Standard error of the mean when samples of one cluster go together.

    sandwich: ``G/(G-1) · Σ_g (Σ_{i∈g} e_i)² / n²``, the cluster-robust (CR1) variance of an intercept. miller:
    ``s²/n + Σ_g Σ_{i≠j} e_i e_j / n²`` with n - 1 in s, smaller with few clusters. NaN for a single cluster.
    """
    errors = np.asarray(values, float) - np.mean(values)
    sums, _sizes = _cluster_sums(errors, clusters)
    num_samples, num_clusters = len(errors), len(sums)
    if num_clusters != num_distinct(clusters) or len(clusters) != num_samples:
        raise DataError(f"{len(clusters)} cluster names for {num_samples} values")
    if num_clusters < 2:
        return float("nan")
    if form == "sandwich":
        return float(math.sqrt(num_clusters / (num_clusters - 1) * (sums**2).sum()) / num_samples)
    cross = (sums**2).sum() - (errors**2).sum()
    return float(math.sqrt(standard_error(values) ** 2 + cross / num_samples**2))


def wilson_interval(successes: float, num_samples: float, *, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share; stays inside 0 … 1. ``num_samples`` may be an effective (non-integer) size."""
    if num_samples <= 0:
        return float("nan"), float("nan")
    share = successes / num_samples
    middle = (share + z * z / (2 * num_samples)) / (1 + z * z / num_samples)
    half = z / (1 + z * z / num_samples) * math.sqrt(share * (1 - share) / num_samples + z * z / (4 * num_samples**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high  # and not 8e-17


def mean_estimate(values: Values, *, clusters: Clusters | None = None, binary: bool = False) -> Estimate:
    """The mean of per-sample scores with standard error and 95 % interval.

    Scores of 0 and 1 get a Wilson interval; under clustering with the effective size n · (SE / clustered SE)², or the
    number of clusters where all scores are equal. Other scores get mean ± 1.96 SE, and Wilson's where they lie in 0 to 1
    and that would leave it or be a point.
    """
    num_samples = len(values)
    if num_samples == 0:
        nan = float("nan")
        return Estimate(nan, nan, nan, nan, 0, None, "no samples")
    values = np.asarray(values, float)
    value = float(np.mean(values))
    distinct = num_samples if clusters is None else num_distinct(clusters)
    clustered = clusters is not None and distinct < num_samples
    error = clustered_standard_error(values, clusters) if clustered and clusters is not None else standard_error(values)
    num_clusters = distinct if clustered else None
    name = "clustered SE (sandwich G/(G-1))" if clustered else "SE"
    low, high = value - Z95 * error, value + Z95 * error
    shares = values.min() >= 0 and values.max() <= 1
    if binary or (shares and (error == 0 or low < 0 or high > 1)):  # shares vary less than right and wrong: it covers
        size = float(num_samples)
        if clustered:
            plain = standard_error(values)
            size = num_samples * (plain / error) ** 2 if error > 0 and plain > 0 else float(num_clusters or 1)
            size = min(size, float(num_samples))
        low, high = wilson_interval(value * size, size)
        return Estimate(value, error, low, high, num_samples, num_clusters, f"Wilson, {name}")
    return Estimate(value, error, low, high, num_samples, num_clusters, f"normal, {name}")


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], float],
    clusters: Clusters,
    *,
    repeats: int = _REPEATS,
    seed: int = 0,
) -> Estimate:
    """Any statistic of sample positions with a cluster-bootstrap standard error and percentile interval: whole
    clusters are drawn with replacement. For totals that are no means (F1, MME, circular). Of more than 50,000 samples: `_by_groups`."""
    if not len(clusters):
        nan = float("nan")
        return Estimate(nan, nan, nan, nan, 0, None, "no samples")
    distinct = num_distinct(clusters)
    num_clusters = distinct if distinct < len(clusters) else None
    groups = _random_groups(clusters, seed)
    if groups:
        value, each = float(statistic(np.arange(len(clusters)))), [statistic(positions) for positions in groups]
        error, half, method = _by_groups(each, bool(num_clusters), seed)
        return Estimate(value, error, value - half, value + half, len(clusters), num_clusters, method)
    members = _members(clusters)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        picks = generator.integers(0, len(members), len(members))
        drawn.append(statistic(np.concatenate([members[pick] for pick in picks])))
    value = float(statistic(np.arange(len(clusters))))
    return estimate_draws(value, drawn, len(clusters), num_clusters, seed)


def estimate_draws(value: float, drawn: Values, num_samples: int, num_clusters: int | None, seed: int) -> Estimate:
    """A statistic with what a bootstrap's draws say of it. num_clusters: None where every sample is its own."""
    low, high = (float(edge) for edge in np.nanpercentile(drawn, [2.5, 97.5]))
    method = f"{'cluster ' if num_clusters else ''}bootstrap, {len(drawn)} draws, seed {seed}"
    return Estimate(value, float(np.nanstd(drawn, ddof=1)), low, high, num_samples, num_clusters, method)


def _random_groups(clusters: Clusters, seed: int) -> list[np.ndarray]:
    """Positions cut at random into groups of whole clusters; none where a bootstrap is affordable or the clusters are too few."""
    if len(clusters) <= _MANY:
        return []
    codes = _codes(clusters)
    count = int(codes.max()) + 1
    number = min(_GROUPS, count // _IN_A_GROUP)
    if number < _FEWEST_GROUPS:
        return []
    group = np.random.default_rng(seed).permutation(np.arange(count) % number)[codes]
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _by_groups(values: Values, clustered: bool, seed: int) -> tuple[float, float, str]:
    """(standard error, half the 95 % interval, what it is called) of a statistic by its values in disjoint random groups: their
    deviation over √groups, with Student's t (Wolter, Introduction to Variance Estimation, 2nd ed., chapter 2). It is told once of
    every sample where a bootstrap tells it hundreds of times."""
    from scipy.stats import t

    told = np.asarray(values, float)
    told = told[np.isfinite(told)]
    if len(told) < 2:
        return float("nan"), float("nan"), "no groups"
    error = standard_error(told)
    units = "groups of clusters" if clustered else "groups"
    return error, float(t.ppf(0.975, len(told) - 1)) * error, f"{len(told)} random {units}, seed {seed}"


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts (binomial, one half)."""
    total = only_a + only_b
    if total == 0:
        return 1.0
    if total > _EXACT:  # by logarithms: the whole numbers have as many digits as there are answers
        steps = np.arange(1, min(only_a, only_b) + 1, dtype=float)
        logs = np.concatenate([[0.0], np.cumsum(np.log((total - steps + 1) / steps))]) - total * math.log(2)
        return float(min(1.0, 2 * np.exp(logs - logs.max()).sum() * np.exp(logs.max())))
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_comparison(
    values_a: Values,
    values_b: Values,
    *,
    clusters: Clusters | None = None,
    binary: bool = False,
    repeats: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """B minus A over matched samples. Independent samples scored 0 or 1: exact McNemar. Otherwise a paired cluster
    bootstrap of the mean difference (p: share of centred draws at least as far from 0). The interval is always the
    bootstrap's."""
    if len(values_a) != len(values_b):
        raise DataError(f"paired comparison needs the same samples: {len(values_a)} and {len(values_b)} values")
    differences = np.asarray(values_b, float) - np.asarray(values_a, float)
    names = np.arange(len(differences)) if clusters is None else clusters
    distinct = num_distinct(names)
    clustered = distinct < len(names)
    sums, sizes = _cluster_sums(differences, names)
    kind_sums, kind_sizes, times = _kinds(sums, sizes)

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        if (
            len(sums) > _MANY and len(times) <= _FEW
        ):  # how often each kind of cluster is drawn, in place of a million draws
            drawn = generator.multinomial(len(sums), times / len(sums), size=count)
            return drawn @ kind_sums / (drawn @ kind_sizes)
        picks = generator.integers(0, len(sums), (count, len(sums)))
        return sums[picks].sum(1) / sizes[picks].sum(1)

    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    difference, low, high, p_value = _bootstrap_difference(float(differences.mean()), draw, repeats, seed, len(sums))
    method = f"paired {'cluster ' if clustered else ''}bootstrap, {repeats} draws, seed {seed}"
    if binary and not clustered:
        p_value, method = mcnemar_exact(losses, wins), f"McNemar exact; interval: {method}"
    count = distinct if clustered else None
    return Comparison(difference, low, high, p_value, wins, losses, len(differences), count, method)


def paired_bootstrap(
    statistic_a: Callable[[np.ndarray], float],
    statistic_b: Callable[[np.ndarray], float],
    clusters: Clusters,
    *,
    repeats: int = _REPEATS,
    seed: int = 0,
) -> Comparison:
    """B minus A of any statistic of sample positions, both taken on the same draws of whole clusters."""
    everything = np.arange(len(clusters))
    if groups := _random_groups(clusters, seed):
        each = [statistic_b(positions) - statistic_a(positions) for positions in groups]
        return _paired_by_groups(statistic_b(everything) - statistic_a(everything), each, clusters, seed)
    members = _members(clusters)

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        results = []
        for _ in range(count):
            picks = np.concatenate([members[k] for k in generator.integers(0, len(members), len(members))])
            results.append(statistic_b(picks) - statistic_a(picks))
        return np.asarray(results)

    observed = statistic_b(everything) - statistic_a(everything)
    return draw_difference(observed, draw, len(clusters), len(members), repeats=repeats, seed=seed)


def draw_difference(
    observed: float,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    num_samples: int,
    num_clusters: int,
    *,
    repeats: int,
    seed: int,
) -> Comparison:
    """A difference with its interval and p from draws of whole clusters. draw: (generator, how many) → differences."""
    difference, low, high, p_value = _bootstrap_difference(observed, draw, repeats, seed, num_clusters)
    clustered = num_clusters < num_samples
    method = f"paired {'cluster ' if clustered else ''}bootstrap, {repeats} draws, seed {seed}"
    return Comparison(difference, low, high, p_value, 0, 0, num_samples, num_clusters if clustered else None, method)


def _paired_by_groups(observed: float, each: Values, clusters: Clusters, seed: int) -> Comparison:
    """A difference with its interval and p from its values in random groups."""
    from scipy.stats import t

    distinct = num_distinct(clusters)
    count = distinct if distinct < len(clusters) else None
    error, half, method = _by_groups(each, count is not None, seed)
    p_value = float(2 * t.sf(abs(observed) / error, len(each) - 1)) if error > 0 else float(observed == 0)
    return Comparison(
        observed, observed - half, observed + half, p_value, 0, 0, len(clusters), count, f"paired {method}"
    )


def holm(p_values: Values) -> list[float]:
    """Holm's step-down adjustment for several tests, in the given order."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return adjusted


def _bootstrap_difference(
    observed: float, draw: Callable[[np.random.Generator, int], np.ndarray], repeats: int, seed: int, num_clusters: int
) -> tuple[float, float, float, float]:
    if num_clusters < 2:
        return observed, float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    block = max(1, min(repeats, 2_000_000 // num_clusters))
    drawn = np.concatenate([draw(generator, min(block, repeats - done)) for done in range(0, repeats, block)])
    low, high = (float(edge) for edge in np.nanpercentile(drawn, [2.5, 97.5]))
    beyond = (np.abs(drawn - observed) >= abs(observed) - 1e-12).sum()
    return observed, low, high, float((1 + beyond) / (1 + len(drawn)))


def num_distinct(names: Clusters) -> int:
    """How many different ones there are."""
    return len(np.unique(names)) if isinstance(names, np.ndarray) else len(set(names))


def _codes(clusters: Clusters) -> np.ndarray:
    """Numbers in place of names, as they first appear."""
    if isinstance(clusters, np.ndarray):
        _, first, places = np.unique(clusters, return_index=True, return_inverse=True)
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[places]
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def _kinds(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different (sum, size) of clusters, and how many clusters there are of each."""
    kinds, times = np.unique(sums + 1j * sizes, return_counts=True)
    return np.real(kinds), np.imag(kinds), times


def _cluster_sums(values: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    if len(clusters) != len(values):
        raise DataError(f"{len(clusters)} cluster names for {len(values)} values")
    codes = _codes(clusters)
    return np.bincount(codes, weights=values), np.bincount(codes).astype(float)


def _members(clusters: Clusters) -> list[np.ndarray]:
    codes = _codes(clusters)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(codes) else []
