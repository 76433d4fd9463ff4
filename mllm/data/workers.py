"""How many processes must read and resize pictures so that training does not wait for them?

Where a stage says ``num_workers: auto``, it begins with a few, and a few steps later the number comes from what was measured: the seconds
that a step's batches took to read, by the seconds that the step took without waiting. The batches are the same with any number.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mllm import distributed
from mllm.data.collate import Batch

AT_FIRST = 4
"""Workers until the need is measured, where the cores allow it; also the lanes of shards, whose order depends on their number."""
WARM_UP, MEASURED = 2, 6
"""Steps that are not measured (compilation), and steps that are."""
_MORE = 1.5
"""Workers for so much more than the measured need: pictures differ, and so do steps."""


def cores_per_process() -> int:
    """Cores of this machine that one training process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def at_first(cores: int) -> int:
    """Workers to begin with: one core is the training process's own."""
    return max(0, min(AT_FIRST, cores - 1))


def needed(reading: float, step: float, cores: int) -> int:
    """Workers for a step of ``step`` seconds whose batches take ``reading`` seconds to read in one process; at most a core each but one."""
    return max(0, min(cores - 1, max(1, math.ceil(_MORE * reading / max(step, 1e-6)))))


class WorkerChoice:
    """Measures steps as they pass, and says once how many workers are enough: of all processes the most.

    divides: the number must divide this one (lanes of shards); 0: any may be.
    """

    def __init__(self, divides: int = 0):
        self.cores, self.divides = cores_per_process(), divides
        self.first = self.allowed(at_first(self.cores))
        self._steps: list[tuple[float, float]] = []
        self._handed = 0.0

    def allowed(self, workers: int) -> int:
        """The number itself, or the next that divides the lanes (the largest that the cores allow)."""
        if not self.divides or workers < 1:
            return workers
        fitting = [n for n in range(1, self.divides + 1) if self.divides % n == 0]
        enough = [n for n in fitting if n >= workers and n <= max(1, self.cores - 1)]
        return enough[0] if enough else max(n for n in fitting if n <= workers)

    def hand(self) -> None:
        """A step's batches are handed out now."""
        self._handed = time.perf_counter()

    def back(self, micro: Sequence[Batch]) -> tuple[int, str] | None:
        """The step is done and the next is asked for. Returns, once, the number of workers and a line that tells why. All processes must
        call it at the same steps."""
        self._steps.append((sum(batch.seconds for batch in micro), time.perf_counter() - self._handed))
        if len(self._steps) != WARM_UP + MEASURED:
            return None
        own = tuple(statistics.median(values) for values in zip(*self._steps[WARM_UP:]))
        reading, step = max(distributed.gather_objects(own), key=lambda pair: pair[0] / max(pair[1], 1e-6))
        workers = self.allowed(needed(reading, step, self.cores))
        bound = ", as many as its cores allow" if workers < _MORE * reading / max(step, 1e-6) else ""
        return workers, (
            f"num_workers auto: {workers} for each process{bound}: pictures and text of a step take {1e3 * reading:,.0f} ms to read, the "
            f"step {1e3 * step:,.0f} ms ({self.cores} cores a process)"
        )


def timed(parts: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The same batches; each knows how long it took to come."""
    while True:
        began = time.perf_counter()
        batch: Any = next(parts, None)
        if batch is None:
            return
        batch[0].seconds = time.perf_counter() - began
        yield batch
