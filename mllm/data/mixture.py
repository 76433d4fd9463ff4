"""Which sample comes k-th? A pure function of seed and k, so that any position can be computed and none need be
stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mllm.data.lookup import load_mixture
from mllm.data.quarantine import Quarantine, read_quarantine
from mllm.data.sources import Source, open_source
from mllm.data.spec import DatasetSpec, MixtureSpec
from mllm.errors import ConfigError, DataError

_BLOCK = 4096


class Draw(NamedTuple):
    """One sample of the endless stream."""

    number: int
    """Position in the stream: ``epoch * len(mixture) + position``."""
    dataset: int
    """Index into ``Mixture.sources``."""
    turn: int
    """How often the dataset was drawn from before; decides the row."""
    row: int


class Mixture:
    """Datasets drawn in a fixed random order: ``locate(k)`` says which row of which dataset the k-th sample is.

    One epoch is ``len(mixture)`` samples; the stream goes on over epochs, each shuffled anew (globally, over all
    datasets; a streaming dataset keeps its own order and only its places are shuffled). With repeat r a dataset gives r
    · rows samples per epoch; with weights its share of ``epoch_size``. Either way it goes through all its rows before
    any comes again. Rows on a dataset's quarantine list never come.
    """

    def __init__(
        self,
        spec: MixtureSpec | Any,
        *,
        seed: int = 0,
        shuffle: bool = True,
        sources: Sequence[Source] | None = None,
    ):
        self.spec = load_mixture(spec)
        self.seed, self.shuffle = seed, shuffle
        specs = [item.dataset for item in self.spec.datasets]
        if sources is None:
            sources = [open_source(s) for s in specs if isinstance(s, DatasetSpec)]
        self.sources = list(sources)
        self.quarantines: list[Quarantine] = [read_quarantine(source) for source in self.sources]
        self.quarantined: list[dict[int, str]] = [quarantine.rows for quarantine in self.quarantines]
        self._allowed: list[np.ndarray | None] = []
        self.sizes: list[int] = []
        for item, source, bad in zip(self.spec.datasets, self.sources, self.quarantined, strict=True):
            size = min(len(source), item.limit or len(source))
            bad_rows = np.array(sorted(row for row in bad if row < size), np.int64)
            if not len(bad_rows):
                self._allowed.append(None)
            elif source.random_access:
                self._allowed.append(np.setdiff1d(np.arange(size, dtype=np.int64), bad_rows))
                size -= len(bad_rows)
            else:
                raise DataError(
                    f"{source.name}: a quarantine list needs row numbers that can be skipped; not while streaming"
                )
            if size == 0:
                raise DataError(
                    f"{source.name}: all {len(source)} rows are on the quarantine list {source.quarantine_path()}"
                )
            self.sizes.append(size)
        self.num_rows = [min(len(s), i.limit or len(s)) for s, i in zip(self.sources, self.spec.datasets, strict=True)]
        self.counts = self._counts()
        self._starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.sharded = [source.shards is not None for source in self.sources]
        self._streams = any(not s.random_access and s.shards is None for s in self.sources)
        self._refuse_sharded()
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Dataset → hash of its rows, and of which are left out where some are: another set means another order."""
        return {
            source.name: source.fingerprint + (f"-{left_out.digest()}" if left_out.rows else "")
            for source, left_out in zip(self.sources, self.quarantines, strict=True)
        }

    def left_out(self) -> list[str]:
        """One line for every dataset with a quarantine list: how many rows it leaves out, and why."""
        lines = (q.describe(s.name, len(s)) for s, q in zip(self.sources, self.quarantines, strict=True))
        return [line for line in lines if line is not None]

    def locate(self, numbers: int | Sequence[int] | np.ndarray) -> list[Draw]:
        """The draws at these positions of the stream."""
        wanted = np.atleast_1d(np.asarray(numbers, np.int64))
        dataset = np.empty(len(wanted), np.int64)
        turn = np.empty(len(wanted), np.int64)
        row = np.empty(len(wanted), np.int64)
        epochs = wanted // len(self)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            places = wanted[here] - epoch * len(self)
            if self._streams:
                order, before = self._order(int(epoch))
                dataset[here] = order[places]
                inside = np.array([self._rank(order, before, int(place)) for place in places], np.int64)
            else:
                slots = permute(places, len(self), (self.seed, "epoch", int(epoch))) if self.shuffle else places
                dataset[here] = np.searchsorted(self._starts, slots, side="right") - 1
                inside = slots - self._starts[dataset[here]]
            turn[here] = epoch * np.asarray(self.counts, np.int64)[dataset[here]] + inside
        for index in np.unique(dataset):
            here = np.flatnonzero(dataset == index)
            row[here] = self._rows(int(index), turn[here])
        return [Draw(*(int(v) for v in values)) for values in zip(wanted, dataset, turn, row)]

    def substitute(self, draw: Draw, attempt: int) -> Draw:
        """What to take instead of a draw that cannot be used: the dataset's next rows, for attempt 1, 2 …"""
        turn = draw.turn + attempt
        return draw._replace(turn=turn, row=int(self._rows(draw.dataset, np.array([turn]))[0]))

    def _rows(self, dataset: int, turns: np.ndarray) -> np.ndarray:
        size = self.sizes[dataset]
        rows = turns % size
        if self.shuffle and self.sources[dataset].random_access:
            passes = turns // size
            for number in np.unique(passes):
                here = passes == number
                rows[here] = permute(rows[here], size, (self.seed, "rows", dataset, int(number)))
        allowed = self._allowed[dataset]
        return rows if allowed is None else allowed[rows]

    def _counts(self) -> list[int]:
        items = self.spec.datasets
        if items[0].weight is None:
            return [max(1, round((item.repeat or 1) * size)) for item, size in zip(items, self.sizes, strict=True)]
        total = self.spec.epoch_size or sum(self.sizes)
        weights = np.array([item.weight for item in items], np.float64)
        exact = weights / weights.sum() * total
        counts = np.floor(exact).astype(np.int64)
        for index in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
            counts[index] += 1
        if (counts == 0).any():
            name = self.sources[int(np.argmin(counts))].name
            raise DataError(
                f"{name}: its weight gives it no sample in an epoch of {total}; raise the weight or epoch_size"
            )
        return counts.tolist()

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset of every place of an epoch, how many of each dataset lie before every block of places)."""
        slots = np.arange(len(self), dtype=np.int64)
        if self.shuffle:
            slots = permute(slots, len(self), (self.seed, "epoch", epoch))
        order = (np.searchsorted(self._starts, slots, side="right") - 1).astype(np.uint16)
        before = np.zeros((len(order) // _BLOCK + 1, len(self.sources)), np.int64)
        for block in range(1, len(before)):
            part = order[(block - 1) * _BLOCK : block * _BLOCK]
            before[block] = before[block - 1] + np.bincount(part, minlength=len(self.sources))
        return order, before

    def _refuse_sharded(self) -> None:
        """Raises `ConfigError` for what shards cannot do: their rows have no number before they are read."""
        for item, source in zip(self.spec.datasets, self.sources, strict=True):
            if source.shards is None:
                continue
            if item.limit is not None:
                raise ConfigError(f"{source.name}: limit takes the first rows by number; of shards name fewer in path")
            if self._streams:
                raise ConfigError(f"{source.name} lies in shards, which cannot be mixed with data of streaming: true")

    @staticmethod
    def _rank(order: np.ndarray, before: np.ndarray, place: int) -> int:
        block, dataset = place // _BLOCK, order[place]
        return int(before[block, dataset] + np.count_nonzero(order[block * _BLOCK : place] == dataset))


def permute(indices: np.ndarray, size: int, key: tuple) -> np.ndarray:
    """A keyed random permutation of 0 … size - 1, applied to ``indices``, without a table.

    Six Feistel rounds on the smallest even number of bits that holds ``size``, walked until the result is in range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    if size <= 1:
        return np.zeros_like(indices)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    digest = hashlib.sha512("/".join(map(str, key)).encode()).digest()
    keys = np.frombuffer(digest, "<u8")[:6].astype(np.uint64)
    values = np.asarray(indices).astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> shift, values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[todo] = (left << shift) | right
        todo = todo[values[todo] >= np.uint64(size)]
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
