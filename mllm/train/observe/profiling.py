"""Where does a step's time go? A profiler's trace of some steps, on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WARM_UP = 2
"""Steps before the first recorded one: compilation, allocation and the first batches are not what is asked for."""


class StepProfiler:
    """Records ``steps`` steps of a stage with `torch.profiler` into ``<folder>/<name>.json`` (for chrome://tracing or
    Perfetto) and the costliest operations into ``<folder>/<name>.txt``. steps 0: does nothing."""

    def __init__(self, folder: Path, name: str, steps: int):
        self.folder, self.name, self.steps = folder, name, steps
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
        profiler, self._profiler, self.steps = self._profiler, None, 0
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"{self.name}.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
        (self.folder / f"{self.name}.txt").write_text(table, encoding="utf-8")
