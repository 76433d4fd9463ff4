"""Which samples made the loss or the gradient leap, or stop being a number?"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mllm import distributed
from mllm.errors import MllmError

_log = logging.getLogger(__name__)
WINDOW, ENOUGH = 64, 16
"""Steps that a value is compared with, and how many of them there must be before anything is called a leap."""
WIDE = 10.0
"""A leap is so many usual spreads (scaled median deviations, at least a tenth of the median) above the median."""
_SHOWN = 20


class TrainingDiverged(MllmError, ArithmeticError):
    """The loss or the gradient is not finite; the message names the samples of the step."""


def diverged(what: str, value: float, micro: Sequence[Any]) -> TrainingDiverged:
    """The error for a value that is not finite, with the samples of all processes; all of them must call it."""
    names = [name for part in distributed.gather_objects(sample_names(micro)) for name in part]
    shown = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
    return TrainingDiverged(
        f"the {what} became {value}. Samples of this step: {shown}. The last checkpoint is untouched; lower the rate "
        "or max_grad_norm, or put the sample on the quarantine list (mllm data check), and go on with --resume"
    )


def sample_names(micro: Sequence[Any]) -> list[str]:
    """``dataset/id`` of every sample in some batches."""
    return [f"{dataset}/{key}" for batch in micro for dataset, key in zip(batch.datasets, batch.ids)]


class SpikeDetector:
    """Watches loss and gradient norm; a leap is warned of and written, with this process's samples of the step, to
    ``path`` (one JSON line each). It changes nothing in training, so a resumed run needs no memory of it.

    quiet: the stage's first steps, of which none is told: while the rate rises, norms do too."""

    def __init__(self, path: Path, *, quiet: int = 0):
        self.path, self.quiet = path, quiet
        self.history: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self.spikes = 0

    def __call__(self, stage: str, step: int, values: dict[str, float], micro: Sequence[Any]) -> None:
        """values: ``loss`` and ``grad_norm`` of the step that these batches made."""
        for name, history in self.history.items():
            value = values[name]
            usual = median(history) if len(history) >= ENOUGH else None
            if usual is not None:
                spread = 1.4826 * median(abs(v - usual) for v in history)
                if step > self.quiet and value > usual + WIDE * max(spread, 0.1 * abs(usual)):
                    self._tell(stage, step, name, value, usual, sample_names(micro))
            history.append(value)

    def _tell(self, stage: str, step: int, name: str, value: float, usual: float, names: list[str]) -> None:
        self.spikes += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"stage": stage, "step": step, "what": name, "value": value, "median": usual, "samples": names}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.spikes <= _SHOWN and distributed.is_main():
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            _log.warning(
                "%s step %d: %s leapt to %.4g (median of the last steps %.4g). Its samples: %s (all in %s)",
                stage, step, name.replace("grad_norm", "gradient norm"), value, usual, shown, self.path.parent,
            )  # fmt: skip
