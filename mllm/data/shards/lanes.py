"""In which order do rows of shards come, so that many processes read each of them once and a killed run goes on at the same row?

The stream is cut into lanes. A lane owns some of the shards (where there are fewer shards than lanes, a part of one), reads them one
after another in a shuffled order that is another in every pass, and hands out windows of rows: ``shuffle_buffer`` of them are held,
shuffled and cut into batches. Seed, lane and number of the window decide a window; its place (shard, row, byte) is all that a
checkpoint keeps. Nothing is counted beforehand: memory is two windows a lane, whatever the number of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mllm.data.mixture import Draw, Mixture, permute
from mllm.data.shards.read import Item
from mllm.data.shards.rows import ShardRows
from mllm.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a lane goes on in a dataset: the row ``number`` of its ``shard``-th shard in its ``passes``-th pass, which begins at
    ``start``."""

    passes: int = 0
    shard: int = 0
    number: int = 0
    start: int = 0


@dataclass(frozen=True)
class LanePlace:
    """Where a lane goes on: batch ``batch`` of window ``window``, whose rows begin at ``readers`` (dataset → place)."""

    window: int = 0
    batch: int = 0
    readers: dict[int, Place] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for a checkpoint."""
        return {**asdict(self), "readers": {str(key): asdict(place) for key, place in self.readers.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LanePlace:
        readers = {int(key): Place(**place) for key, place in data["readers"].items()}
        return cls(int(data["window"]), int(data["batch"]), readers)


class Taken(NamedTuple):
    """What a draw of the mixture became: a row of a shard, or the draw itself of a dataset that is read by row number."""

    draw: Draw
    item: Item | None


@dataclass
class Window:
    """Rows that are held together. faults: (dataset, what could not be used); following: where the next window begins."""

    taken: list[Taken]
    faults: list[tuple[int, Item]]
    following: dict[int, Place]


class ShardReader:
    """A lane's rows of one dataset, without end. ``place`` is where the next one lies."""

    def __init__(self, shards: ShardRows, *, lane: int, lanes: int, seed: int, shuffle: bool, place: Place):
        self.shards, self.place = shards, place
        self._key, self._shuffle = (seed, "lane", shards.name, lane), shuffle
        count = len(shards.shards)
        order = _order(count, (seed, "shards", shards.name), shuffle)
        if count >= lanes:
            self.own, self.part, self.parts = order[lane::lanes], 0, 1
        else:
            self.own, self.part = [order[lane % count]], lane // count
            self.parts = len(range(lane % count, lanes, count))

    def __iter__(self) -> Iterator[Item]:
        """Rows, and between them what could not be read (`Item.row` is None). Raises `DataError` when a whole pass holds no row."""
        while True:
            order, found = _order(len(self.own), (*self._key, self.place.passes), self._shuffle), False
            whole = self.place.shard == self.place.number == 0
            while self.place.shard < len(order):
                place = self.place
                shard = self.shards.shards[self.own[order[place.shard]]]
                for item in self.shards.read(shard, place.number, max(place.start, 0)) if place.start >= 0 else ():
                    self.place = Place(place.passes, place.shard, item.number + 1, item.after)
                    if item.number % self.parts == self.part:
                        found = found or item.row is not None
                        yield item
                self.place = Place(place.passes, place.shard + 1)
            if whole and not found:
                raise DataError(
                    f"{self.shards.where}: none of {len(self.own)} shards, {shard} the last, holds a row of use"
                )
            self.place = Place(self.place.passes + 1)


class Lane:
    """The windows of one lane, from a place on; the next one is read while this one is used.

    mixture: says which dataset each draw is of. size: rows of a window.
    """

    def __init__(self, mixture: Mixture, *, lane: int, lanes: int, size: int, place: LanePlace):
        self.mixture, self.lane, self.lanes, self.size, self.place = mixture, lane, lanes, size, place
        self._readers: dict[int, tuple[ShardReader, Iterator[Item]]] = {}
        for dataset, source in enumerate(mixture.sources):
            if source.shards is not None:
                reader = ShardReader(
                    source.shards,
                    lane=lane,
                    lanes=lanes,
                    seed=mixture.seed,
                    shuffle=mixture.shuffle,
                    place=place.readers.get(dataset, Place()),
                )
                self._readers[dataset] = reader, iter(reader)
        self._ahead: _Ahead | None = None
        self._number = place.window

    def next_window(self) -> Window:
        """The next rows, shuffled."""
        window = self._ahead.result() if self._ahead is not None else self._read(self._number)
        self._number += 1
        self._ahead = _Ahead(self._read, self._number)
        return window

    def _read(self, number: int) -> Window:
        draws = self.mixture.locate((np.arange(self.size) + number * self.size) * self.lanes + self.lane)
        faults: list[tuple[int, Item]] = []
        taken = []
        for draw in draws:
            item = self._take(draw.dataset, faults) if draw.dataset in self._readers else None
            taken.append(Taken(draw, item))
        order = _order(len(taken), (self.mixture.seed, "window", self.lane, number), self.mixture.shuffle)
        places = {dataset: reader.place for dataset, (reader, _) in self._readers.items()}
        return Window([taken[index] for index in order], faults, places)

    def _take(self, dataset: int, faults: list[tuple[int, Item]]) -> Item:
        for item in self._readers[dataset][1]:
            if item.row is not None:
                return item
            faults.append((dataset, item))
        raise AssertionError("a lane's rows have no end")


class _Ahead:
    """Work in a thread that holds no process up at its end."""

    def __init__(self, work: Callable[[int], Window], number: int):
        self._work, self._number = work, number
        self._window: Window | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._window = self._work(self._number)
        except BaseException as error:  # raised where the window is asked for
            self._error = error

    def result(self) -> Window:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._window is not None
        return self._window


def _order(count: int, key: tuple, shuffle: bool) -> Sequence[int]:
    numbers = np.arange(count, dtype=np.int64)
    return (permute(numbers, count, key) if shuffle else numbers).tolist()
