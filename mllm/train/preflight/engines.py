"""Which engines can a stage be trained with?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm.errors import ConfigError
from mllm.heads.build import heads_kept_whole
from mllm.recipe import Recipe, StageSpec
from mllm.train.added_rows import PART, added_rows
from mllm.train.engine.optim import ZERO_OPTIMIZERS
from mllm.train.engine.units import layers_to_share
from mllm.train.preflight.memory import PREFERENCE
from mllm.train.preflight.scaling import ENGINES

if TYPE_CHECKING:
    from mllm.train.engine.trainable import TrainableModel

ENCODERS_ALONE = ("contrastive", "masked", "exits", "recognition", "agglomeration")
"""Kinds of stages in which the language model reads nothing: its weights are there, its activations are not."""
_SHARE_WEIGHTS, _ZERO = {"zero3", "fsdp2"}, {"zero1", "zero2", "zero3"}


def possible_engines(recipe: Recipe, stage: StageSpec, model: TrainableModel) -> tuple[str, ...]:
    """Engines by name that the stage can be trained with, the one that shares least first; each of the others is refused when it starts.
    model: the stage's, perhaps on the meta device."""
    optimizer = stage.optimizer
    if stage.kind in PREFERENCE or optimizer.type not in ZERO_OPTIMIZERS:
        return ("none",)
    refused: set[str] = set()
    if any(spec.lora is not None and spec.lora.bits is not None for spec in stage.learning().values()):
        refused |= _SHARE_WEIGHTS | _ZERO
    if optimizer.compact or optimizer.ema is not None:
        refused |= _ZERO
    options = stage.options if stage.kind == "sft" else {}
    adversarial = isinstance(options.get("robust"), dict) and options["robust"].get("adversarial")
    if heads_kept_whole(recipe.model.heads) or stage.kind in (*ENCODERS_ALONE, "tokenizer") or adversarial:
        refused |= _SHARE_WEIGHTS
    if stage.float8 is not None:
        refused |= _SHARE_WEIGHTS
    if options.get("word_contrast") or _rows_beside_adapter(stage, model):
        refused.add("zero3")
    if not _has_layers_to_share(model, stage):
        refused.add("fsdp2")
    return tuple(engine for engine in ENGINES if engine not in refused)


def _rows_beside_adapter(stage: StageSpec, model: TrainableModel) -> bool:
    lora = stage.learning()[PART].lora if PART in stage.learning() else None
    return lora is not None and lora.added_tokens and bool(added_rows(model))


def _has_layers_to_share(model: nn.Module, stage: StageSpec) -> bool:
    try:
        layers_to_share(model, stage.name)
    except ConfigError:
        return False
    return True
