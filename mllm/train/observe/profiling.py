"""Where does a step's time go? A profiler's trace of some steps, on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mllm.train.observe.trace import of_kernels, of_operations

WARM_UP = 2
"""Steps before the first recorded one: compilation, allocation and the first batches are not what is asked for."""


class StepProfiler:
    """Records ``steps`` steps of a stage with `torch.profiler` into ``<folder>/<name>.json`` (for chrome://tracing or
    Perfetto) and the costliest operations into ``<folder>/<name>.txt``, and tells in a line what kinds of work they were. steps 0:
    does nothing."""

    def __init__(self, folder: Path, name: str, steps: int, tell: Callable[[str], Any] = lambda line: None):
        self.folder, self.name, self.steps, self.tell = folder, name, steps, tell
        self.seen = 0
        self._profiler: Any = None

    def __call__(self) -> None:
        """Before each step, and once after the last."""
        if self.steps and self.seen == WARM_UP:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        if self._profiler is not None and self.seen == WARM_UP + self.steps:
            self.close()
        self.seen += 1

    def close(self) -> None:
        """Write what was recorded."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        recorded, self.steps = min(self.steps, self.seen - WARM_UP), 0
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"{self.name}.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        averages = profiler.key_averages()
        table = averages.table(sort_by=order, row_limit=40, max_name_column_width=60)
        (self.folder / f"{self.name}.txt").write_text(table, encoding="utf-8")
        trace = self.folder / f"{self.name}.json"
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        division = of_kernels(events, recorded) or of_operations(averages, recorded)
        self.tell(f"{self.name}: a profiled step of {division.whole:,.0f} ms: {division.line()} ({trace})")
