"""How do rows of shards become the batches of one process, whatever the number of workers, and how is such a run resumed?

The lanes (`mllm.data.shards.lanes`) are dealt to the processes and each one's to its workers, so that every shard is read by one
worker of one process. A process takes its batches from its lanes in turn; the k-th comes from worker k modulo their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mllm.data.collate import Batch, Dropped, collate, collate_packed, split_by_tokens
from mllm.data.dataset import DropLog
from mllm.data.mixture import Mixture, permute
from mllm.data.packing import pack, split_to_multiple
from mllm.data.parallel import pool_context
from mllm.data.shards.lanes import Lane, LanePlace, Taken, Window
from mllm.data.shards.read import Item
from mllm.data.workers import timed
from mllm.errors import AlignmentError, ConfigError, DataError, blamed_on
from mllm.processing.chat import EncodedSample
from mllm.stopping import outlive_the_step
from mllm.threads import one_thread
from mllm.types import Sample

_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class BatchPlace:
    """Which batch of which lane: as `mllm.data.plan.Position`."""

    lane: int
    place: LanePlace


class LaneBatches:
    """The batches of one lane. size: rows of a window, rounded down to whole batches. The other arguments as `ShardStream` has them."""

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[[Sample], EncodedSample],
        *,
        batch_size: int,
        size: int,
        pad_token_id: int,
        max_length: int | None = None,
        count: Callable[[Sample], int] | None = None,
        max_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.mixture, self.encode, self.count = mixture, encode, count
        self.batch_size, self.size = batch_size, max(batch_size, size // batch_size * batch_size)
        self.pad_token_id, self.max_length, self.max_tokens = pad_token_id, max_length, max_tokens
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, lane: int, lanes: int, place: LanePlace) -> Iterator[list[Batch]]:
        """From a place on, without end; several where a padded batch of more than ``max_tokens`` was split."""
        reader = Lane(self.mixture, lane=lane, lanes=lanes, size=self.size, place=place)
        while True:
            window = reader.next_window()
            dropped = [self._fault(dataset, item) for dataset, item in window.faults]
            rows = self._rows(window, (self.mixture.seed, "rows of window", lane, place.window), dropped)
            for index in range(place.batch, len(rows) // self.batch_size):
                own = rows[index * self.batch_size : (index + 1) * self.batch_size]
                dropped, bad = [], dropped if index == 0 else []
                here = LanePlace(place.window, index, place.readers)
                last = index + 1 == len(rows) // self.batch_size
                following = LanePlace(place.window + 1, 0, window.following) if last else None
                following = following or LanePlace(place.window, index + 1, place.readers)
                parts = self._batch(window, own, bad)
                for part in parts:
                    part.position = part.following = BatchPlace(lane, here)  # type: ignore[assignment]
                    draw = window.taken[own[0][0]].draw
                    part.epoch = draw.number / len(self.mixture)
                parts[-1].following = BatchPlace(lane, following)  # type: ignore[assignment]
                parts[0].dropped = bad
                yield parts
            place = LanePlace(place.window + 1, 0, window.following)

    def _rows(self, window: Window, key: tuple, dropped: list[Dropped]) -> list[list[int]]:
        """Places in the window by row of a batch: one each, or packed by their lengths, the rows shuffled by ``key``."""
        if self.max_length is None:
            return [[index] for index in range(len(window.taken))]
        assert self.count is not None
        lengths = []
        for taken in window.taken:
            found = self._try(taken, self.count, dropped)
            lengths.append(0 if found is None else min(found, self.max_length))
        rows = split_to_multiple(pack(lengths, self.max_length), self.batch_size)
        if not rows:
            raise DataError(f"packing: none of {len(lengths)} rows can be used. The last: {dropped[-1].reason}")
        order = permute(np.arange(len(rows)), len(rows), key).tolist()
        order += [order[k % len(order)] for k in range(-len(order) % self.batch_size)]
        return [rows[index] for index in order]

    @one_thread()
    def _batch(self, window: Window, rows: list[list[int]], dropped: list[Dropped]) -> list[Batch]:
        if self.max_length is not None:
            packed = [self._packed(window, row, dropped) for row in rows]
            return [collate_packed(packed, max_length=self.max_length, pad_token_id=self.pad_token_id)]
        samples = [self._good(window, row[0], dropped) for row in rows]
        multiple = self.pad_to_multiple_of
        parts = [samples] if self.max_tokens is None else split_by_tokens(samples, self.max_tokens, multiple or 1)
        return [collate(part, pad_token_id=self.pad_token_id, pad_to_multiple_of=multiple) for part in parts]

    def _packed(self, window: Window, row: list[int], dropped: list[Dropped]) -> list[EncodedSample]:
        found = [self._try(window.taken[index], self.encode, dropped) for index in row]
        return [sample for sample in found if sample is not None] or [self._good(window, row[0], dropped, first=1)]

    def _good(self, window: Window, index: int, dropped: list[Dropped], first: int = 0) -> EncodedSample:
        """A row, or in its stead the next good one of the window of the same dataset."""
        dataset = window.taken[index].draw.dataset
        turned = chain(window.taken[index:], window.taken[:index])
        same = (taken for taken in turned if taken.draw.dataset == dataset)
        for taken in islice(same, first, _BAD_IN_A_ROW):
            sample = self._try(taken, self.encode, dropped)
            if sample is not None:
                return sample
        name = self.mixture.sources[dataset].name
        raise DataError(f"{name}: no row of {self.size} that are held can be used. The last: {dropped[-1].reason}")

    def _try(self, taken: Taken, work: Callable[[Sample], Any], dropped: list[Dropped]) -> Any:
        source, item = self.mixture.sources[taken.draw.dataset], taken.item
        number = taken.draw.row if item is None else item.number
        shard = "" if item is None else item.shard
        identity, kind = str(number) if item is None else item.key, "cannot be read"
        try:
            sample = source[number] if item is None else source.sample_of(item)
            identity = sample.id
            where = source.where(number, sample.id) if item is None else source.where_of(item)
            kind = "cannot be encoded"
            with blamed_on(where):
                return work(sample)
        except (DataError, AlignmentError) as error:
            kind = "placeholders and images differ" if isinstance(error, AlignmentError) else kind
            named = shard in str(error)
            reason = str(error) if named else f"{shard}, row {number}: {error}"
            dropped.append(Dropped(source.name, number, identity, reason, kind, shard))
            return None

    def _fault(self, dataset: int, item: Item) -> Dropped:
        source = self.mixture.sources[dataset]
        reason = f"{source.where_of(item)}: {item.problem}"
        return Dropped(source.name, item.number, item.key, reason, item.kind, item.shard)


class _Loaded(IterableDataset):
    """A worker's share of a process's batches."""

    def __init__(self, batches: LaneBatches, places: dict[int, LanePlace], lanes: int, turn: int):
        self.batches, self.places, self.lanes, self.turn = batches, places, lanes, turn

    def __iter__(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        turn = self.turn + worker  # of this worker's first batch
        own = list(self.places)[turn % workers :: workers]
        streams = [timed(self.batches(lane, self.lanes, self.places[lane])) for lane in own]
        index = turn // workers % len(own)
        while True:
            yield next(streams[index])
            index = (index + 1) % len(streams)


class ShardStream:
    """One process's batches of a mixture with shards, as `mllm.data.dataset.DataStream` is of others.

    total: samples to train on over all processes; None: endless. buffer: rows that a lane holds and shuffles. lanes_per_process:
    default: one a worker. max_length: pack rows of so many tokens, as the rows come; count: sample → tokens, for that.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[[Sample], EncodedSample],
        *,
        batch_size: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
        total: int | None = None,
        num_workers: int = 0,
        buffer: int = 512,
        lanes_per_process: int | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
        on_drop: Callable[[list[Dropped]], None] | None = None,
        **batches: Any,
    ):
        self.batches = LaneBatches(
            mixture, encode, batch_size=batch_size, size=buffer, pad_token_id=pad_token_id, **batches
        )
        self.mixture, self.rank, self.world_size, self.total = mixture, rank, world_size, total
        self.num_workers, self.pin_memory, self.prefetch_factor = num_workers, pin_memory, prefetch_factor
        self.on_drop = on_drop if on_drop is not None else DropLog()
        self.rows_per_step = batch_size * world_size
        self.lanes = world_size * (lanes_per_process or max(1, num_workers))
        self.turn = 0
        self._before = 0
        """Samples of starts with another number of processes."""
        self.places = self._own({})

    @property
    def num_batches(self) -> int | None:
        """Of this process, from the present place to the total."""
        if self.total is None:
            return None
        return max(0, -(-(self.total - self._before) // self.rows_per_step) - self.turn)

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self.num_workers, len(self.places))
        loader = DataLoader(
            _Loaded(self.batches, dict(self.places), self.lanes, self.turn),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=outlive_the_step if workers else None,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor if workers else None,
            multiprocessing_context=pool_context() if workers else None,
            generator=torch.Generator().manual_seed(0),  # as `DataStream`
        )
        for parts in islice(loader, self.num_batches):
            for batch in parts:
                if batch is parts[-1]:
                    self.turn += 1
                    self.places[batch.following.lane] = batch.following.place
                if batch.dropped:
                    self.on_drop(batch.dropped)
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """This process's lanes; a checkpoint holds those of all (`merged`)."""
        places = {str(lane): place.as_dict() for lane, place in self.places.items()}
        return {
            "lanes": self.lanes,
            "turn": self.turn,
            "before": self._before,
            "rows": self.rows_per_step,
            "places": places,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a `merged` state: at the same rows in the same order with the same number of processes and workers, else with the same
        rows in another. Raises `ConfigError` where there are more processes than lanes."""
        lanes, rows = int(state["lanes"]), int(state["rows"])
        if lanes < self.world_size:
            raise ConfigError(
                f"the run was started with {lanes} lanes of shards (processes × num_workers), so at most {lanes} processes can go on "
                f"with it, not {self.world_size}"
            )
        self.lanes = lanes
        self.places = self._own({int(k): LanePlace.from_dict(v) for k, v in state["places"].items()})
        same = rows == self.rows_per_step
        self.turn = int(state["turn"]) if same else 0
        self._before = int(state["before"]) + (0 if same else int(state["turn"]) * rows)

    def _own(self, known: dict[int, LanePlace]) -> dict[int, LanePlace]:
        own = range(self.rank, self.lanes, self.world_size)
        return {lane: known.get(lane, LanePlace()) for lane in own}


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of all processes of their `ShardStream.state_dict`s."""
    places = {lane: place for state in states for lane, place in state["places"].items()}
    return {**states[0], "places": places}
