"""How is a total that is no mean drawn again and again without going through its samples each time?"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mllm.eval.metrics import Metric, Scored
from mllm.eval.report.statistics import Comparison, Estimate, draw_difference, estimate_draws, num_distinct


class Tallies:
    """What samples add to a metric's headline (`Metric.counts`), told one after another: some numbers each, and no sample stays."""

    def __init__(self, metric: Metric):
        self._metric = metric
        self._numbers, self._parts, self._units = array("d"), array("i"), array("q")
        self._part_codes, self._unit_codes = dict[str, int](), dict[tuple[str, str], int]()
        self._width = 0

    def append(self, item: Scored) -> None:
        """One more sample."""
        found = self._metric.counts(item)
        if found is None:
            return
        part, numbers = found
        self._width = len(numbers)
        self._numbers.extend(numbers)
        self._parts.append(self._part_codes.setdefault(part, len(self._part_codes)))
        key = self._metric.group_key
        name = item.meta.get(key) if key is not None else None
        if name is None:
            self._units.append(-1 - len(self._units))  # by itself
        else:
            self._units.append(self._unit_codes.setdefault((part, str(name)), len(self._unit_codes)))

    def taken(self, clusters: np.ndarray, positions: np.ndarray | None = None) -> Drawn | None:
        """What can be drawn by ``clusters``, one a sample, of all samples or of those at ``positions``. None where the metric tells no
        counts, and where samples that are scored together are of different clusters."""
        if not self._width:
            return None
        numbers = np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, self._width)
        parts, units = np.frombuffer(self._parts, dtype=np.int32), np.frombuffer(self._units, dtype=np.int64)
        if positions is not None:
            numbers, parts, units = numbers[positions], parts[positions], units[positions]
        _, places = np.unique(clusters, return_inverse=True)
        if self._unit_codes:
            _, first, units = np.unique(units, return_index=True, return_inverse=True)
            if (places != places[first][units]).any():
                return None
            columns = [np.bincount(units, weights=column) for column in numbers.T]
            numbers, parts, places = np.stack(columns, axis=1), parts[first], places[first]
        return Drawn(self._metric, self._metric.joined(numbers), parts, places, num_distinct(clusters), len(clusters))


@dataclass(frozen=True)
class Drawn:
    """Numbers of each unit that is scored as one, ready to be drawn by clusters. sums: ``(units, j)``; parts, clusters: ``(units,)``."""

    metric: Metric
    sums: np.ndarray
    parts: np.ndarray
    clusters: np.ndarray
    num_clusters: int
    num_samples: int

    def headline(self, times: np.ndarray | None = None) -> float:
        """Of every cluster taken so many times; once without."""
        weights = None if times is None else times[self.clusters].astype(float)
        kinds = int(self.parts.max()) + 1
        columns = [
            np.bincount(self.parts, weights=column if weights is None else column * weights, minlength=kinds)
            for column in self.sums.T
        ]
        return float(self.metric.headline(np.stack(columns, axis=1)))

    def draws(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """How often each cluster is drawn, again and again."""
        while True:
            picks = generator.integers(0, self.num_clusters, self.num_clusters)
            yield np.bincount(picks, minlength=self.num_clusters)


def bootstrap_tallies(drawn: Drawn, *, repeats: int, seed: int = 0) -> Estimate:
    """`bootstrap_estimate` of a headline that counts make up: the same draws, by sums."""
    draws = drawn.draws(np.random.default_rng(seed))
    found = [drawn.headline(next(draws)) for _ in range(repeats)]
    clustered = drawn.num_clusters < drawn.num_samples
    return estimate_draws(drawn.headline(), found, drawn.num_samples, drawn.num_clusters if clustered else None, seed)


def paired_tallies(first: Drawn, second: Drawn, *, repeats: int, seed: int = 0) -> Comparison:
    """`paired_bootstrap` of two headlines that counts make up, over the same samples."""

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        draws: Iterator[np.ndarray] = first.draws(generator)
        return np.asarray([_difference(first, second, next(draws)) for _ in range(count)])

    observed = second.headline() - first.headline()
    return draw_difference(observed, draw, first.num_samples, first.num_clusters, repeats=repeats, seed=seed)


def _difference(first: Drawn, second: Drawn, times: np.ndarray) -> float:
    return second.headline(times) - first.headline(times)
