"""Which engines can a stage be trained with?"""

from __future__ import annotations

from mllm.heads.build import heads_kept_whole
from mllm.recipe import Recipe, StageSpec
from mllm.train.engine.optim import ZERO_OPTIMIZERS
from mllm.train.preflight.memory import PREFERENCE
from mllm.train.preflight.scaling import LADDER

ENCODERS_ALONE = ("contrastive", "masked", "exits", "recognition", "agglomeration")
"""Kinds of stages in which the language model reads nothing: its weights are there, its activations are not."""


def possible_engines(recipe: Recipe, stage: StageSpec) -> tuple[str, ...]:
    """Engines by name that the stage can be trained with, the one that shares least first, of those that ``auto`` chooses from."""
    specs, optimizer = stage.learning().values(), stage.optimizer
    if stage.kind in PREFERENCE or optimizer.type not in ZERO_OPTIMIZERS:
        return LADDER[:1]
    bits = any(spec.lora is not None and spec.lora.bits is not None for spec in specs)
    if bits:
        return _of("none", "sharded")
    if optimizer.compact or optimizer.ema is not None:  # DeepSpeed takes neither
        return _of("none", "sharded", "fsdp2")
    robust = stage.kind == "sft" and isinstance(stage.options.get("robust"), dict)
    if heads_kept_whole(recipe.model.heads) or stage.kind in (*ENCODERS_ALONE, "tokenizer") or robust:
        return _of("none", "sharded", "zero1", "zero2")
    return LADDER


def _of(*engines: str) -> tuple[str, ...]:
    return tuple(engine for engine in LADDER if engine in engines)
