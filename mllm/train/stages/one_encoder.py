"""What do the stages share that train one encoder of the model by itself, with parts of their own beside it: masked, exits, recognition?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mllm.encoders.base import VisionEncoder
from mllm.errors import ConfigError
from mllm.processing.protocol import Processor
from mllm.recipe import LearnSpec, StageSpec
from mllm.train.checkpoint.export import save_stage
from mllm.train.engine.base import choose_engine
from mllm.train.engine.trainable import StageConfig, StageModel
from mllm.train.start import start_model
from mllm.train.trainer import Run, seed_everything, train

if TYPE_CHECKING:
    from mllm.train.stages.wrapped_processor import WrappedProcessor

_NOT_HERE = ("packing", "group_by_length", "max_tokens_per_batch", "compile", "chat_template", "cache_features")


class EncoderModel(StageModel):
    """An encoder and what learns beside it, as the trainer wants a model. The encoder goes back into the multimodal model, the rest is
    dropped."""

    def __init__(self, kind: str, name: str, encoder: VisionEncoder, *, beside: str, prefixes: Iterable[str]):
        """beside: name of the part that the rest belongs to; prefixes: of its parameters' names."""
        super().__init__()
        self.encoder_name, self.encoder = name, encoder
        self.beside, self._prefixes = beside, list(prefixes)
        self.config = StageConfig(kind)

    def part_prefixes(self) -> dict[str, list[str]]:
        return {f"encoders.{self.encoder_name}": ["encoder."], self.beside: self._prefixes}

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        modules = dict(self.named_modules())
        return {
            part: [(name, modules[name]) for name in (prefix.rstrip(".") for prefix in prefixes) if name in modules]
            for part, prefixes in self.part_prefixes().items()
        }

    def part_of(self, parameter_name: str) -> str:
        return f"encoders.{self.encoder_name}" if parameter_name.startswith("encoder.") else self.beside

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.encoder.set_gradient_checkpointing(True)


def check_one_encoder(stage: StageSpec, kind: str, *, because: str, lr: str) -> None:
    """kind: with its article, as "a masked"; because: why it has no use for what is refused; lr: of the example. Raises `ConfigError`
    for settings that no such stage can have."""
    where = f"stages.{stage.name}"
    for key in _NOT_HERE:
        if getattr(stage, key):
            raise ConfigError(f"{where}.{key}: {kind} stage {because}, and its encoder learns; leave it out")
    if choose_engine(stage).shares_weights:
        raise ConfigError(
            f"{where}.engine: an encoder is small; use none, sharded, zero1 or zero2 (zero3 and fsdp2 cut every layer)"
        )
    if len(stage.learn) != 1 or not next(iter(stage.learn)).startswith("encoders"):
        raise ConfigError(f"{where}.learn: {kind} stage trains one encoder, e.g. learn: {{encoders.vision: {lr}}}")


def encoder_to_train(stage: StageSpec, known: Iterable[str]) -> str:
    """The name of the encoder that the stage's ``learn`` means. Raises `ConfigError` for one that is not there."""
    part, names = next(iter(stage.learn)), list(known)
    name = names[0] if part == "encoders" and len(names) == 1 else part.removeprefix("encoders.")
    if name not in names:
        raise ConfigError(
            f"stages.{stage.name}.learn: name one encoder: " + " or ".join(f"encoders.{n}" for n in names)
        )
    return name


def train_one_encoder(
    run: Run,
    stage: StageSpec,
    previous: Path | None,
    folder: Path,
    build: Callable[[Mapping[str, VisionEncoder], Processor], tuple[EncoderModel, WrappedProcessor]],
    *,
    lr_beside: float | None,
) -> bool:
    """The same contract as `StageKind.train`. build: makes the stage's model and reader; lr_beside: of what learns beside the encoder;
    default: the encoder's."""
    model, processor = start_model(run.recipe, stage, previous)
    seed_everything(run.recipe.seed, f"{stage.name}/{stage.kind}", same=True)
    wrapped, reader = build(model.model.vision_tower.encoders, processor)
    part = next(iter(stage.learn))
    learn: dict[str, float | LearnSpec] = {
        f"encoders.{wrapped.encoder_name}": stage.learn[part],
        wrapped.beside: lr_beside or stage.learning()[part].lr,
    }
    engine = train(run, stage.model_copy(update={"learn": learn}), wrapped, reader)
    if engine is None:
        return False
    engine.model = model
    save_stage(engine, processor, run.recipe, stage, folder, run.record())
    return True
