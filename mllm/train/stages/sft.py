"""How is a model taught to continue conversations? The stage kind ``sft``."""

from __future__ import annotations

from pathlib import Path

from mllm.recipe import StageSpec
from mllm.train.checkpoint.export import save_stage
from mllm.train.stages.kind import StageKind
from mllm.train.start import start_model
from mllm.train.trainer import Run, train


class SftStage(StageKind):
    """Supervised fine-tuning: next-token loss on what the assistant says."""

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        model, processor = start_model(run.recipe, stage, previous)
        engine = train(run, stage, model, processor)
        del model
        if engine is None:
            return False
        save_stage(engine, processor, run.recipe, stage, folder, run.record())
        return True
