"""What is a kind of stage to the run: how are its settings checked, and what trains it?"""

from __future__ import annotations

from pathlib import Path

from mllm.recipe import Recipe, StageSpec
from mllm.train.preflight.stage_settings import check_stage
from mllm.train.stages import STAGE_KINDS
from mllm.train.trainer import Run


class StageKind:
    """Registered by the name that ``kind:`` gives; never instantiated."""

    name = ""

    @classmethod
    def check(cls, stage: StageSpec, recipe: Recipe) -> None:
        """Raises `ConfigError` or `DataError` for what would end this stage later; nothing is built. The common checks, and
        `check_options`."""
        check_stage(stage, recipe)
        cls.check_options(stage)

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        """What this kind asks of its stages beyond the common, by the recipe alone: no data are opened. Raises `ConfigError`."""

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        """Train the stage from the previous stage's folder, or the recipe's model, into ``folder``, which is written whole or
        not at all; returns whether the stage was finished."""
        raise NotImplementedError


def kind_of(stage: StageSpec) -> type[StageKind]:
    """The kind that a stage names. Raises `UnknownName`."""
    return STAGE_KINDS.get(stage.kind)
