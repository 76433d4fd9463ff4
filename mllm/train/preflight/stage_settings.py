"""Which settings of a stage contradict each other, or ask for what the model does not have?"""

from __future__ import annotations

from mllm.errors import ConfigError
from mllm.heads.build import drawing_head, heads_kept_whole
from mllm.processing.template import read_template
from mllm.recipe import Recipe, StageSpec
from mllm.train.data import check_some_rows, open_mixture, refuse_with_shards
from mllm.train.engine.base import choose_engine
from mllm.train.engine.groups import learning_by_part, recipe_parts


def check_stage(stage: StageSpec, recipe: Recipe) -> None:
    """Raises `ConfigError` or `DataError` for what would end this stage later: settings that contradict each other,
    parts that the model lacks, data that are not there. Nothing is built."""
    if stage.packing and stage.group_by_length:
        raise ConfigError(f"stages.{stage.name}: packing and group_by_length exclude each other; keep one")
    if stage.max_tokens_per_batch is not None:
        _check_most_tokens(stage, stage.max_tokens_per_batch)
    if stage.samples_per_step is not None and not (stage.packing and stage.gradient_accumulation == 1):
        raise ConfigError(
            f"stages.{stage.name}.samples_per_step: is for packed rows, whose number decides how many micro-steps a step takes; set "
            "packing: true and leave gradient_accumulation out"
        )
    if stage.chat_template is not None:
        read_template(stage.chat_template)
    engine = choose_engine(stage)
    if stage.optimizer.compact and stage.dtype != "bfloat16":
        raise ConfigError(
            f"stages.{stage.name}.optimizer: master: low_bits and moments: bfloat16 are for dtype: bfloat16, and dtype is {stage.dtype}"
        )
    heads = recipe.model.heads
    whole = heads_kept_whole(heads)
    if whole and engine.shares_weights:
        raise ConfigError(
            f"stages.{stage.name}.engine: a model with head {whole[0]} (type {heads[whole[0]]['type']}) trains with none, sharded, "
            "zero1 or zero2. It runs other parts of the model where a batch has something to teach it, as a visual tokenizer where there "
            "are pictures to draw, and ZeRO-3 and fsdp2 need every process to run the same modules"
        )
    if stage.packing and any(head.get("type") == "next_scale" for head in heads.values()):
        raise ConfigError(f"stages.{stage.name}.packing: a next_scale head needs a mask of its own; set packing: false")
    if stage.draw is not None and drawing_head(heads) is None:
        raise ConfigError(
            f"stages.{stage.name}.draw: the model draws nothing; give model.heads one that draws, or leave draw out"
        )
    for part, spec in learning_by_part(recipe_parts(recipe.model), stage).items():
        if (engine.zero_stage or engine.shares_weights) and spec.lora is not None and spec.lora.bits is not None:
            kind = "ZeRO" if engine.zero_stage else "fsdp2"
            raise ConfigError(
                f"stages.{stage.name}.learn.{part}.lora.bits: 4-bit weights and {kind} do not mix; use engine: none"
            )
    mixture = open_mixture(stage, recipe.seed)
    refuse_with_shards(stage, mixture)
    check_some_rows(mixture, stage)


def _check_most_tokens(stage: StageSpec, most: int) -> None:
    where = f"stages.{stage.name}.max_tokens_per_batch"
    if stage.packing:
        raise ConfigError(
            f"{where}: packed rows all have max_length {stage.max_length}, so batch_size says how many tokens are computed at "
            "once; leave it out"
        )
    if most < stage.max_length:
        raise ConfigError(
            f"{where} is {most}, and one row may have max_length {stage.max_length}: a row is never split; give at least "
            f"{stage.max_length}, or lower max_length, which cuts longer samples"
        )
