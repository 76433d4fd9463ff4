"""How is a model taught to continue conversations? The stage kind ``sft``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train.checkpoint.export import save_stage
from mllm.train.drop_encoders import DropEncoders, check_chances
from mllm.train.engine.base import choose_engine
from mllm.train.robust import Robust, RobustOptions
from mllm.train.stages.kind import StageKind
from mllm.train.start import start_model
from mllm.train.trainer import Run, train
from mllm.train.word_contrast import WordContrast


class SftOptions(StrictModel):
    """``options`` of a stage of kind sft."""

    robust: RobustOptions | None = None
    """Harder pictures while it learns."""
    drop_encoders: dict[str, float] = Field(default_factory=dict)
    """Encoder → share of the pictures that are seen without it while the stage learns (`mllm.train.drop_encoders`); 1: never seen."""
    word_contrast: float = Field(default=0.0, ge=0)
    """Weight of a second loss: visual tokens say the words of their own row's answer, by the embeddings that the language model has for
    them, and not those of other rows (`mllm.train.word_contrast`)."""
    words_alone: bool = False
    """Only that second loss: the language model is not run, so connector and encoders learn in a fraction of the time what their visual
    tokens are to say; a later stage teaches the language model to use them."""


def check_sft(stage: StageSpec) -> SftOptions:
    """The stage's options. Raises `ConfigError` for settings that do not go together."""
    where = f"stages.{stage.name}"
    options = validate(SftOptions, stage.options, where=f"{where}.options")
    check_chances(options.drop_encoders, f"{where}.options.drop_encoders")
    if options.word_contrast and (stage.packing or stage.batch_size < 2):
        raise ConfigError(
            f"{where}.options.word_contrast: compares the rows of a batch, one picture's words a row; set packing: false and a "
            "batch_size of 2 or more, or leave it out"
        )
    if options.word_contrast and choose_engine(stage).zero_stage == 3:
        raise ConfigError(
            f"{where}.engine: options.word_contrast reads visual tokens where only ranks with pictures have any, for which those without "
            "would wait forever; use none, sharded, fsdp2, zero1 or zero2"
        )
    if options.words_alone:
        idle = [part for part in stage.learn if not part.startswith(("connector", "encoders"))]
        if not options.word_contrast or idle or options.robust is not None:
            why = f"{idle[0]} is not run" if idle else "needs word_contrast, and no robust"
            raise ConfigError(
                f"{where}.options.words_alone: {why}; learn connector and encoders, with options {{word_contrast: 1.0, words_alone: "
                "true}"
            )
    if options.robust is not None and stage.cache_features:
        raise ConfigError(
            f"{where}.cache_features: options.robust changes the pictures, so their features cannot be kept; leave one out"
        )
    if options.robust is not None and options.robust.adversarial and choose_engine(stage).shares_weights:
        raise ConfigError(
            f"{where}.engine: options.robust.adversarial needs the gradient of pixels alone; use none, sharded, zero1 or zero2"
        )
    return options


class SftStage(StageKind):
    """Supervised fine-tuning: next-token loss on what the assistant says."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_sft(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        model, processor = start_model(run.recipe, stage, previous, in_shares=True)
        options = check_sft(stage)
        robust, handles = options.robust, list[Any]()
        if robust is not None:
            if model.model.vision_tower is None:
                raise ConfigError(f"stages.{stage.name}.options.robust: this model sees no pictures; leave it out")
            handles.append(Robust(robust, model).attach(model))
        if options.drop_encoders:
            where = f"stages.{stage.name}.options.drop_encoders"
            handles.append(DropEncoders(options.drop_encoders, model, where).attach())
        if options.word_contrast:
            contrast = WordContrast(options.word_contrast, set(processor.tokenizer.all_special_ids))
            handles.append(contrast.attach_alone(model) if options.words_alone else contrast.attach(model))
        engine = train(run, stage, model, processor)
        for handle in handles:
            handle.remove()
        del model
        if engine is None:
            return False
        save_stage(engine, processor, run.recipe, stage, folder, run.record())
        return True
