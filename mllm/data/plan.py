"""Which samples make batch k of every process, so that a run can start again at any batch? The plan of a run's data; what a
run costs is `mllm.train.preflight.plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mllm.data.mixture import Draw, Mixture, permute
from mllm.data.packing import pack, split_to_multiple
from mllm.errors import ConfigError, DataError


@dataclass(frozen=True, order=True)
class Position:
    """A place in a plan: batch ``batch`` of window ``window``. Plain numbers; a checkpoint stores `as_dict`."""

    window: int = 0
    batch: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"window": self.window, "batch": self.batch}

    @classmethod
    def from_dict(cls, data: dict[str, int]) -> Position:
        return cls(int(data["window"]), int(data["batch"]))


@dataclass(frozen=True)
class PlannedBatch:
    """One process's batch: rows of draws (one draw a row unless packed), its place, and the place after it."""

    rows: tuple[tuple[Draw, ...], ...]
    position: Position
    following: Position
    epoch: float
    """How many epochs of data came before this batch."""


class Plan:
    """Batches in stream order. Every process computes the same windows and takes its own rows, so that all see
    different samples and the same number of batches.

    batch_size: rows per process and batch. total: samples to train on (e.g. epochs × ``len(mixture)``); None: endless.
    The last batches are filled up from the samples that would come next.
    """

    def __init__(self, mixture: Mixture, *, batch_size: int, world_size: int = 1, total: int | None = None):
        self.mixture, self.batch_size, self.world_size, self.total = mixture, batch_size, world_size, total
        self.rows_per_step = batch_size * world_size
        self.window_size = self.rows_per_step
        self._window = lru_cache(maxsize=2)(self.arrange)

    def arrange(self, window: int) -> list[list[list[Draw]]]:
        """Batches of a window over all processes; each a list of ``batch_size * world_size`` rows of draws."""
        raise NotImplementedError

    def draws(self, window: int) -> list[Draw]:
        """The samples of a window; the last window ends with the total, rounded up to whole steps."""
        start, stop = window * self.window_size, (window + 1) * self.window_size
        if self.total is not None and stop > self.total:
            rest = max(self.total - start, 0)
            stop = start + -(-rest // self.rows_per_step) * self.rows_per_step
        return self.mixture.locate(np.arange(start, stop))

    def batches(self, rank: int, start: Position | None = None) -> Iterator[PlannedBatch]:
        """Process ``rank``'s batches from ``start`` on."""
        position = start or Position()
        while self.total is None or position.window * self.window_size < self.total:
            steps = self._window(position.window)
            start_sample = position.window * self.window_size
            samples = self.window_size if self.total is None else min(self.window_size, self.total - start_sample)
            for index in range(position.batch, len(steps)):
                mine = steps[index][rank * self.batch_size : (rank + 1) * self.batch_size]
                last = index + 1 == len(steps)
                here = Position(position.window, index)
                following = Position(position.window + 1, 0) if last else Position(position.window, index + 1)
                epoch = (start_sample + samples * index / len(steps)) / len(self.mixture)
                yield PlannedBatch(tuple(tuple(row) for row in mine), here, following, epoch)
            position = Position(position.window + 1, 0)

    def num_batches(self, start: Position | None = None) -> int:
        """Batches per process from ``start`` to the total."""
        if self.total is None:
            raise ConfigError("an endless plan has no number of batches; give total")
        start = start or Position()
        windows = range(start.window, -(-self.total // self.window_size))
        return sum(len(self._window(window)) for window in windows) - (start.batch if len(windows) else 0)

    def resume(self, position: Position, *, window_size: int, rows_per_step: int) -> Position:
        """``position`` of a run with another number of processes or rows, in this plan.

        Equal plans give it back. Else the batches differ, but the stream goes on within one window of where it stopped.
        """
        if window_size == self.window_size:
            return Position(position.window, position.batch * rows_per_step // self.rows_per_step)
        sample = position.window * window_size + position.batch * rows_per_step
        window, rest = divmod(sample, self.window_size)
        return Position(window, rest // self.rows_per_step)


class SequentialPlan(Plan):
    """Batches of consecutive samples; a window is 64 of them, worked out at once."""

    def __init__(self, mixture: Mixture, *, batch_size: int, world_size: int = 1, total: int | None = None):
        super().__init__(mixture, batch_size=batch_size, world_size=world_size, total=total)
        self.window_size = 64 * self.rows_per_step

    def arrange(self, window: int) -> list[list[list[Draw]]]:
        draws, step = self.draws(window), self.rows_per_step
        return [[[draw] for draw in draws[k : k + step]] for k in range(0, len(draws), step)]

    def num_batches(self, start: Position | None = None) -> int:
        if self.total is None:
            return super().num_batches(start)
        start = start or Position()
        done = start.window * self.window_size // self.rows_per_step + start.batch
        return max(0, -(-self.total // self.rows_per_step) - done)


class GroupedPlan(Plan):
    """Batches of samples of similar length: within a window of ``window_batches`` batches, samples are sorted by
    length, cut into batches, and the batches shuffled. The longest batch of the run's first window comes first: what
    does not fit in memory fails at once.

    lengths: per dataset of the mixture, tokens by row.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        lengths: Sequence[np.ndarray],
        world_size: int = 1,
        total: int | None = None,
        window_batches: int = 50,
    ):
        super().__init__(mixture, batch_size=batch_size, world_size=world_size, total=total)
        self.lengths = _checked(lengths, mixture, "group_by_length")
        self.window_size = window_batches * self.rows_per_step

    def arrange(self, window: int) -> list[list[list[Draw]]]:
        draws = self.draws(window)
        sizes = np.array([self.lengths[d.dataset][d.row] for d in draws])
        order = np.argsort(-sizes, kind="stable")
        count, step, world = len(draws) // self.rows_per_step, self.rows_per_step, self.world_size
        shuffled = permute(np.arange(count), count, (self.mixture.seed, "batches", window))
        if window == 0 and count:
            shuffled = np.concatenate([[0], shuffled[shuffled != 0]])
        steps = []
        for batch in shuffled:
            chosen = order[batch * step : (batch + 1) * step]
            dealt = [index for rank in range(world) for index in chosen[rank::world]]
            steps.append([[draws[index]] for index in dealt])
        return steps


class PackedPlan(Plan):
    """Rows of several samples: the samples of a window are packed best-fit into rows of ``max_length``, and the rows
    shuffled.

    lengths: per dataset, tokens by row (0: leave the sample out). A window's number of rows is brought to a multiple of
    the rows per step by splitting a few rows; only if every row holds one sample are rows repeated from the window's
    start.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        lengths: Sequence[np.ndarray],
        max_length: int,
        world_size: int = 1,
        total: int | None = None,
        window: int = 2048,
    ):
        super().__init__(mixture, batch_size=batch_size, world_size=world_size, total=total)
        self.lengths, self.max_length = _checked(lengths, mixture, "packing"), max_length
        self.window_size = window

    def draws(self, window: int) -> list[Draw]:
        stop = (window + 1) * self.window_size
        if self.total is not None:
            stop = min(stop, self.total)
        return self.mixture.locate(np.arange(window * self.window_size, stop))

    def arrange(self, window: int) -> list[list[list[Draw]]]:
        draws = self.draws(window)
        sizes = np.array([self.lengths[d.dataset][d.row] for d in draws], np.int64)
        rows = split_to_multiple(pack(np.minimum(sizes, self.max_length), self.max_length), self.rows_per_step)
        if not rows:
            first = window * self.window_size
            raise DataError(
                f"packing: none of the samples {first} to {first + len(draws) - 1} of the stream can be used"
            )
        order = permute(np.arange(len(rows)), len(rows), (self.mixture.seed, "rows of window", window)).tolist()
        missing = -len(order) % self.rows_per_step
        order += [order[i % len(order)] for i in range(missing)]
        step = self.rows_per_step
        return [[[draws[i] for i in rows[r]] for r in order[k : k + step]] for k in range(0, len(order), step)]


class SteppedPlan(PackedPlan):
    """As `PackedPlan`, a window being the samples of one optimizer step: each step learns from exactly ``samples_per_step``, whatever
    their lengths, in as many batches as their rows fill. That number is a multiple of the rows per batch, so that splitting
    rows always comes out and none is repeated (but in the last, shorter step).
    """

    def __init__(self, mixture: Mixture, *, samples_per_step: int, **settings: Any):
        super().__init__(mixture, window=samples_per_step, **settings)
        if samples_per_step % self.rows_per_step:
            raise ConfigError(
                f"samples_per_step is {samples_per_step}, which the {self.rows_per_step} rows of a micro-step (batch_size "
                f"{self.batch_size} × {self.world_size} processes) do not divide; give another batch_size"
            )

    def num_steps(self, start: Position | None = None) -> int:
        """Optimizer steps from ``start`` to the total."""
        if self.total is None:
            raise ConfigError("an endless plan has no number of steps; give total")
        return max(0, -(-self.total // self.window_size) - (start or Position()).window)


def make_plan(
    mixture: Mixture,
    *,
    batch_size: int,
    world_size: int = 1,
    total: int | None = None,
    packing: bool = False,
    group_by_length: bool = False,
    lengths: Sequence[np.ndarray] | None = None,
    max_length: int | None = None,
    samples_per_step: int | None = None,
) -> Plan:
    """The plan a stage asks for. Packing and grouping need ``lengths`` (`mllm.data.lengths`). Raises `ConfigError`."""
    if packing and group_by_length:
        raise ConfigError("packing and group_by_length exclude each other: packed rows all have max_length")
    common: dict[str, Any] = {"batch_size": batch_size, "world_size": world_size, "total": total}
    if not packing and not group_by_length:
        return SequentialPlan(mixture, **common)
    if lengths is None:
        raise ConfigError("packing and group_by_length need the samples' lengths")
    if group_by_length:
        return GroupedPlan(mixture, lengths=lengths, **common)
    if max_length is None:
        raise ConfigError("packing needs max_length")
    if samples_per_step is not None:
        return SteppedPlan(mixture, lengths=lengths, max_length=max_length, samples_per_step=samples_per_step, **common)
    window = max(2048, 16 * batch_size * world_size)
    return PackedPlan(mixture, lengths=lengths, max_length=max_length, window=window, **common)


def _checked(lengths: Sequence[np.ndarray], mixture: Mixture, feature: str) -> list[np.ndarray]:
    for source in mixture.sources:
        if not source.random_access:
            raise ConfigError(
                f"{feature} needs the lengths of all samples, and {source.name} is streamed; set streaming: false"
            )
    for source, table, rows in zip(mixture.sources, lengths, mixture.num_rows, strict=True):
        if len(table) < rows:
            raise ConfigError(f"{feature}: {source.name} has {rows} rows and {len(table)} lengths")
    return [np.asarray(table) for table in lengths]
