"""How are a task's scored answers held while totals and intervals are made, however many there are?"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from mllm.eval.metrics import Metric, Score, Scored
from mllm.eval.report.tallies import Drawn, Tallies
from mllm.eval.spool import Indexed, Names, Spool

Row = Mapping[str, Any]
_ALIKE = 1 << 12
"""So many different (score, target, meta) of each metric stay in memory; of more, each is read from disk when an aggregate asks."""
_Facts = tuple[Score, Any, Mapping[str, Any]]


class ScoredItems(Indexed[Scored]):
    """The samples that a metric scored, made when asked for. Of each, its value and its id are in memory; what samples have in common
    (a verdict, a category) is there once. values: ``(n,)`` float64, an unparsed answer as 0; num_unparsed: how many are; tallies: what
    they add to ``metric``'s headline where that is no mean."""

    def __init__(self, metric: Metric | None = None) -> None:
        self.tallies = None if metric is None or metric.is_mean else Tallies(metric)
        self._names, self._values = Names(), array("d")
        self._codes, self._table = array("i"), list[_Facts]()
        self._numbers: dict[str, int] | None = {}
        self._spool: Spool[_Facts] | None = None
        self.num_unparsed = 0

    def append(self, name: str, facts: _Facts) -> None:
        """One more sample."""
        self._names.append(name)
        value = facts[0].value
        self._values.append(0.0 if value is None else value)
        self.num_unparsed += value is None
        if self.tallies is not None:
            self.tallies.append(Scored(name, *facts))
        if self._numbers is None:
            assert self._spool is not None
            self._spool.append(facts)
            return
        code = self._numbers.setdefault(_key(facts), len(self._table))
        if code == len(self._table):
            self._table.append(facts)
        self._codes.append(code)
        if len(self._table) > _ALIKE:
            self._spool = Spool((self._table[code] for code in self._codes), kept=_ALIKE)
            self._numbers, self._table, self._codes = None, [], array("i")

    @property
    def values(self) -> np.ndarray:
        return np.frombuffer(self._values, dtype=np.float64) if self._values else np.zeros(0)

    def drawn(self, clusters: np.ndarray) -> Drawn | None:
        """`Tallies.taken` of all."""
        return None if self.tallies is None else self.tallies.taken(clusters)

    def facts(self, position: int) -> _Facts:
        """(score, target, meta) of one sample."""
        return self._table[self._codes[position]] if self._spool is None else self._spool[position]

    def __len__(self) -> int:
        return len(self._names)

    def _at(self, place: int) -> Scored:
        return Scored(self._names[place], *self.facts(place))

    def __iter__(self) -> Iterator[Scored]:
        facts = iter(self._spool) if self._spool is not None else map(self._table.__getitem__, self._codes)
        return map(_scored, self._names, facts)


def _scored(name: str, facts: _Facts) -> Scored:
    return Scored(name, *facts)


def _key(facts: _Facts) -> str:
    score, target, meta = facts
    verdict = [score.value, score.extracted, score.rule, dict(score.parts), target, meta]
    return json.dumps(verdict, sort_keys=True, default=repr)


class Clusters:
    """What makes samples dependent, told row by row: the task's cluster where every row has one; else the metric's own groups; else
    the clusters there are, and each other row by itself."""

    def __init__(self, metric: Metric | None = None):
        self._key = None if metric is None else metric.group_key
        self._rows, self._clusters, self._groups = 0, _Codes(), _Codes()
        self._whole = True

    def append(self, row: Row) -> None:
        """One more scored row."""
        cluster = row.get("cluster")
        self._whole = self._whole and cluster is not None
        self._clusters.append(None if cluster is None else cluster)
        if self._key is not None:
            self._groups.append(str(row["meta"].get(self._key, row["id"])))
        self._rows += 1

    def codes(self) -> np.ndarray:
        """``(n,)`` int64: equal where two samples go together, numbered as they first appear."""
        return (self._groups if self._key is not None and not self._whole else self._clusters).numbers()


class _Codes:
    """Names as numbers; None is a name that no other has."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._next, self._codes = 0, array("q")

    def append(self, name: Hashable) -> None:
        code = self._next if name is None else self._known.setdefault(name, self._next)
        self._next += code == self._next
        self._codes.append(code)

    def numbers(self) -> np.ndarray:
        return np.frombuffer(self._codes, dtype=np.int64) if self._codes else np.zeros(0, np.int64)


class Categories:
    """Where the samples of each category stand; named: what a row's category is. A group of samples that are scored together (pairs,
    circles) belongs to the category of its first."""

    def __init__(self, metric: Metric, named: Callable[[Row], Any] = lambda row: row.get("category")):
        self._key, self._named = metric.group_key, named
        self._places: dict[str, array[int]] = {}
        self._of_group: dict[str, str] = {}
        self._rows = 0

    def append(self, row: Row) -> None:
        """One more scored row."""
        name = self._named(row)
        if name is not None:
            if self._key is not None and self._key in row["meta"]:
                name = self._of_group.setdefault(str(row["meta"][self._key]), name)
            self._places.setdefault(str(name), array("q")).append(self._rows)
        self._rows += 1

    def positions(self) -> dict[str, np.ndarray]:
        """Category → positions of its samples, the largest first."""
        order = sorted(self._places.items(), key=lambda place: (-len(place[1]), place[0]))
        return {name: np.frombuffer(places, dtype=np.int64) for name, places in order}


THIRDS = ("surest third", "middle third", "least sure third")


class Sureness:
    """How probable the model held its answers, for their split into thirds; samples that are scored together stay together."""

    def __init__(self, metric: Metric):
        self._together = metric.group_key is not None
        self._values = array("d")

    def append(self, row: Row) -> None:
        """One more scored row."""
        logprob = row.get("logprob")
        self._values.append(math.nan if logprob is None else logprob)

    def positions(self, clusters: np.ndarray) -> dict[str, np.ndarray]:
        """`THIRDS` → positions of their samples; empty where some answer's probability is not told or there are under 30."""
        values = np.frombuffer(self._values, dtype=np.float64) if self._values else np.zeros(0)
        if len(values) < 30 or np.isnan(values).any():
            return {}
        if self._together:
            values = (np.bincount(clusters, values) / np.bincount(clusters))[clusters]
            group = np.unique(np.stack([-values, clusters]), axis=1, return_inverse=True)[1].reshape(-1)
            third = (3 * group // (group.max() + 1)).astype(int)
        else:
            order = np.argsort(-values, kind="stable")
            third = np.empty(len(values), int)
            third[order] = 3 * np.arange(len(values)) // len(values)
        return {name: found for k, name in enumerate(THIRDS) if len(found := np.flatnonzero(third == k))}


class Taken(Indexed[Scored]):
    """Some of the samples, by their positions among all."""

    def __init__(self, items: ScoredItems, positions: np.ndarray):
        self._items, self._positions = items, positions

    def drawn(self, clusters: np.ndarray) -> Drawn | None:
        """`Tallies.taken` of them. clusters: one a sample of these."""
        return None if self._items.tallies is None else self._items.tallies.taken(clusters, self._positions)

    @property
    def values(self) -> np.ndarray:
        return self._items.values[self._positions]

    def __len__(self) -> int:
        return len(self._positions)

    def _at(self, place: int) -> Scored:
        return self._items[int(self._positions[place])]


def scored(row: Row, metric: Metric) -> _Facts | None:
    """(score, target, meta) of a row. A failed generation counts as a wrong, unparsed answer; rows without a target, an undecodable
    image or a usable target take no part: None."""
    entry = row.get("scores", {}).get(metric.label)
    if entry is None or "error" in entry:
        return None
    return Score(entry["value"], entry["extracted"], entry["rule"], entry.get("parts", {})), row["target"], row["meta"]
