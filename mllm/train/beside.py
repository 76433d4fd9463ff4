"""What may a stage do beside the update of its model: train a second network, score held-out data?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm.train.engine.base import Engine
from mllm.train.observe.progress import StageDisplay


class Beside:
    """Called by `mllm.train.trainer.train` on every process; does nothing by itself."""

    def start(self, engine: Engine, *, step: int, total_steps: int, display: StageDisplay) -> None:
        """The engine is built and the stage stands at ``step``."""

    def step(self, step: int, *, last: bool) -> None:
        """The update number ``step`` is done."""

    def report(self) -> dict[str, Any]:
        """What a logged step's record holds besides the trainer's own numbers."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for this; the main process writes it."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; called after `start`."""
