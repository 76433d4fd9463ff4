"""Where do a run's numbers go? Console, `metrics.jsonl`, TensorBoard, wandb or trackio, and a plot of the loss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.errors import UnavailableError
from mllm.install import package_hint
from mllm.recipe import Recipe
from mllm.train.observe.run_info import RunInfo

FILE = "metrics.jsonl"


class Tracker:
    """Writes one record per logged step. Made on the main process only.

    TensorBoard and the services get one step number per run, which grows from stage to stage: most of them drop what comes under a
    number that they have passed.

    Args:
        output: The run's folder.
        recipe: Its ``track`` names the services.
        info: The run's record, where a service's own run id is kept, so that a resumed run goes on with the same curves.
    """

    def __init__(self, output: Path, recipe: Recipe, info: RunInfo | None = None):
        self.path = output / FILE
        self.output = output
        self._file: Any = None
        self._board: Any = None
        self._before = 0
        self._stages = [stage.name for stage in recipe.stages]
        self._info = info
        self._services: list[Any] = [_service(name, recipe, output, info) for name in recipe.track]

    def start_stage(self, stage: str, step: int) -> None:
        """Drop what an interrupted run logged for this stage after ``step``: those steps come again."""
        self._before = self._steps_before(stage)
        if self._board is None:
            begun = self._before + step
            self._board = _tensorboard(self.output, purge_step=begun + 1 if begun else None)
        if self._file is not None:
            self._file.close()
        kept = [r for r in read_metrics(self.output) if r["stage"] != stage or r["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def _steps_before(self, stage: str) -> int:
        """Optimizer steps of the stages before this one, as the run recorded them."""
        done = self._info.data["stages"] if self._info is not None else {}
        earlier = self._stages[: self._stages.index(stage)] if stage in self._stages else []
        return sum(int(done.get(name, {}).get("total_steps", 0)) for name in earlier)

    def log(self, record: dict[str, Any]) -> None:
        """record: ``stage``, ``step`` (of the stage) and numbers; nested mappings of numbers become ``a/b``."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in _flat(record).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(f"{record['stage']}/{key}", value, self._before + record["step"])
        for service in self._services:
            service.log({f"{record['stage']}/{k}": v for k, v in numbers.items()}, step=self._before + record["step"])

    def log_images(self, name: str, pixels: Any, *, step: int) -> None:
        """pixels ``(B, 3, H, W)`` in [0, 1], at a step of the stage: to TensorBoard, where it is installed."""
        if self._board is not None:
            self._board.add_images(name, pixels.float().cpu(), self._before + step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        for service in self._services:
            service.finish()


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Every record of a run, oldest first; a line cut short by a kill is left out."""
    path = output / FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}/")
        elif key not in ("stage", "step"):
            result[f"{prefix}{key}"] = value
    return result


def _tensorboard(output: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(output / "tensorboard"), purge_step=purge_step)


def _service(name: str, recipe: Recipe, output: Path, info: RunInfo | None) -> Any:
    """wandb or trackio, as asked for by ``track:``. Raises `UnavailableError` when it is not installed."""
    try:
        module = __import__(name)
    except ImportError:
        raise UnavailableError(
            f"track: {name} is not installed: {package_hint(name)}, or take it out of track:"
        ) from None
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "mllm") if name == "wandb" else "mllm",
        "name": recipe.name,
        "config": recipe.model_dump(mode="json"),
    }
    known = dict(info.data.get("trackers", {})) if info is not None else {}
    if name == "wandb":
        options |= {"dir": str(output), "resume": "allow", "id": known.get(name)}
    elif known.get(name):
        options |= {"name": known[name], "resume": "allow"}  # trackio knows runs by their name
    run = module.init(**options)
    own = getattr(run, "id" if name == "wandb" else "name", None)
    if info is not None and own:
        info.set(trackers={**known, name: str(own)})
    return run if hasattr(run, "log") and hasattr(run, "finish") else module


def plot_loss(output: Path, stages: Sequence[str]) -> Path | None:
    """``loss.png``: the loss of every stage, raw and smoothed. None without matplotlib or without records."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_metrics(output)
    curves = {
        s: [(r["step"], r["loss"]) for r in records if r["stage"] == s and r.get("loss") is not None] for s in stages
    }
    curves = {stage: points for stage, points in curves.items() if points}
    if not curves:
        return None
    figure = Figure(figsize=(5 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        steps, losses = zip(*points)
        smooth, total, weight = [], 0.0, 0.0  # divided by its weight: the first values do not pull on the rest
        for loss in losses:
            total, weight = 0.9 * total + 0.1 * loss, 0.9 * weight + 0.1
            smooth.append(total / weight)
        axes.plot(steps, losses, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth, linewidth=1.4)
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    path = output / "loss.png"
    figure.savefig(path, dpi=120)
    return path
