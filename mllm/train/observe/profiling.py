"""Where does a step's time go? A profiler's trace of some steps: on request whole, and once by itself in a line."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm import distributed
from mllm.noise import is_verbose
from mllm.train.observe.trace import DATA, NETWORK, Division, of_kernels, of_operations

if TYPE_CHECKING:
    from mllm.recipe import StageSpec
    from mllm.train.checkpoint.resume import Progress

_log = logging.getLogger(__name__)
WARM_UP = 2
"""Steps before the first recorded one: compilation, allocation and the first batches are not what is asked for."""
BY_ITSELF, SHORTEST = 20, 50
"""Steps before the profile that comes by itself, and steps that a start of a stage has at least for it to come."""
_STEPS = 2
_MUCH = {DATA: 0.1, NETWORK: 0.2, "idle": 0.2}
"""Shares of a step from which on its user is told what would help."""
mark = torch.profiler.record_function
"""``with mark("mllm.data"):`` a profile counts what is done in the block by its own kind (`mllm.train.observe.trace.RANGES`)."""


class StepProfiler:
    """Records ``steps`` steps of a stage with `torch.profiler` into ``<folder>/<name>.json`` (for chrome://tracing or
    Perfetto) and the costliest operations into ``<folder>/<name>.txt``, and tells in a line what kinds of work they were. steps 0:
    does nothing."""

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        tell: Callable[[str], Any] = lambda line: None,
        model: nn.Module | None = None,
    ):
        self.folder, self.name, self.steps, self.tell, self.model = folder, name, steps, tell, model
        self.first = WARM_UP
        self.seen = 0
        self._recorded: _Recorded | None = None

    def __call__(self) -> None:
        """Before each step."""
        if self.steps and self.seen == self.first:
            self._recorded = _Recorded(self.model)
        self.seen += 1

    def stepped(self) -> None:
        """After each step."""
        if self._recorded is not None and self.seen == self.first + self.steps:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._recorded is None:
            return
        recorded, self._recorded = self._recorded, None
        steps, self.steps = min(self.steps, self.seen - self.first), 0
        recorded.stop()
        self._told(recorded, steps)

    def _told(self, recorded: _Recorded, steps: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"{self.name}.json"
        division = recorded.division(trace, steps)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
        (self.folder / f"{self.name}.txt").write_text(table, encoding="utf-8")
        self.tell(f"{self.name}: a profiled step of {division.whole:,.0f} ms: {division.line()} ({trace})")


class StepTimes(StepProfiler):
    """Profiles two steps of a stage once, after its warm-up, and tells in a line what a step's time is spent on; nothing is
    written but the record. It reads and changes nothing of the model, the data or random states. A start of the stage with fewer than
    `SHORTEST` steps is left alone.

    left: steps of this start. record: takes what was found (``run.json``).
    """

    def __init__(
        self,
        stage: StageSpec,
        left: int,
        tell: Callable[[str], Any],
        record: Callable[[dict[str, Any]], Any],
        model: nn.Module | None = None,
    ):
        super().__init__(Path(), stage.name, _STEPS if left >= SHORTEST else 0, tell, model)
        self.first, self.record, self.stage = BY_ITSELF, record, stage

    def __call__(self) -> None:
        with self._at_worst_untold():
            super().__call__()

    def close(self) -> None:
        with self._at_worst_untold():
            super().close()

    @contextmanager
    def _at_worst_untold(self) -> Iterator[None]:
        """Nobody asked for the profile: a profiler that fails ends no training."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            self.steps, self._recorded = 0, None
            _log.warning("%s: where a step's time goes is not told, its profile failed: %s", self.name, error)

    def _told(self, recorded: _Recorded, steps: int) -> None:
        if steps < _STEPS:
            return  # the stage ended or was stopped in between
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mllm-") as folder:
            division = recorded.division(Path(folder) / "trace.json", steps)
        if torch.cuda.is_available() and not division.of_gpu:
            raise RuntimeError("no kernel was recorded; perhaps another profiler watches this GPU")
        cost = recorded.cost + time.perf_counter() - began
        parts = {kind: round(value, 3) for kind, value in division.parts().items()}
        self.record(
            {"after_steps": self.seen, "ms": round(division.whole, 3), "parts_ms": parts, "profiling_s": round(cost, 2)}
        )
        lines = [f"{self.name}: a step takes {division.whole:,.0f} ms: {division.line()} (profiled once, {cost:.1f} s)"]
        for line in [*lines, *_helps(division, self.stage)]:
            self.tell(line)


def profiler_of(
    run: Any, stage: StageSpec, progress: Progress, tell: Callable[[str], Any], model: nn.Module
) -> StepProfiler:
    """What profiles a stage: the steps that its user asked for; without a word of it the main process's, once. run: a
    `mllm.train.trainer.Run`."""
    if run.profile is not None:
        name = f"{stage.name}-{distributed.rank()}"
        return StepProfiler(run.output / "profile", name, run.profile, tell, model)
    info, left = run.info, progress.total_steps - progress.step
    if run.stop_after is not None:
        left = min(left, run.stop_after)
    if info is None:
        return StepProfiler(Path(), stage.name, 0)
    return StepTimes(stage, left, tell, lambda found: info.stage(stage.name, step_time=found), model)


def _helps(division: Division, stage: StageSpec) -> Iterator[str]:
    """What would make such a step faster, where it waits."""
    shares = {**division.kinds, "idle": division.idle}
    waits = [kind for kind, least in _MUCH.items() if shares.get(kind, 0.0) >= least * max(division.whole, 1e-9)]
    more = "" if stage.num_workers == "auto" else f"num_workers: auto (now {stage.num_workers}), "
    cures = {
        DATA: f"pictures come too slowly: {more}more cores than {os.cpu_count()}, smaller pictures on disk, or cache_features",
        NETWORK: "processes wait for each other: more gradient_accumulation, an engine that shares less, or `mllm doctor --network`",
        "idle": "the GPU waits for its next kernel: "
        + ("packing or a larger batch_size" if stage.compile else "compile: true, packing or a larger batch_size"),
    }
    yield from (f"[yellow]! {stage.name}: {cures[kind]}" for kind in waits)


class _Recorded:
    """What is done from now on until `stop`, as the profiler sees it. Cost: seconds that starting and stopping took."""

    def __init__(self, model: nn.Module | None):
        if not is_verbose():
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of every start, and of a GPU that is not there
        began = _clock()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler: Any = torch.profiler.profile(activities=kinds)
        self.profiler.start()
        self._stack = ExitStack()
        self._stack.enter_context(_marking_encoders(model))
        self._began = _clock()
        self.cost = self._began - began
        self.seconds = 0.0

    def stop(self) -> None:
        ended = _clock()
        self.seconds = ended - self._began
        self._stack.close()
        self.profiler.stop()
        self.cost += _clock() - ended

    def division(self, trace: Path, steps: int) -> Division:
        """Write the trace, and divide its time."""
        self.profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        return of_kernels(events, steps, seconds=self.seconds) or of_operations(events, steps, seconds=self.seconds)


def _clock() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _marking_encoders(model: nn.Module | None) -> Iterator[None]:
    """For the block, what the model's vision encoders start is marked as theirs."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    if not isinstance(tower, nn.Module):
        yield
        return
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        entered.append(mark("mllm.encoders"))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    hooks = [tower.register_forward_pre_hook(enter), tower.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
