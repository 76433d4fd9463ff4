"""What will a recipe cost, and what is wrong with it, before any GPU is paid for?

Built on the meta device in seconds. Memory is counted by what each engine keeps; activations by a fit to measured 7B steps on one
H200 (bytes per token and layer as a multiple of the hidden and feed-forward widths). Operations as in `mllm.train.observe.flops`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mllm.encoders.catalogue import encoder_config, licence_warnings
from mllm.errors import ConfigError, DataError, MllmError, blamed_on
from mllm.heads.build import heads_with_weights
from mllm.models.build import build_config, config_and_processor, load_tokenizer
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.lora import has_adapters
from mllm.models.loss import DEFAULT_CHUNK
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.vocabulary import grown, num_token_ids
from mllm.odd_settings import odd_settings
from mllm.processing.chat import sample_layouts, split_images
from mllm.processing.protocol import Processor
from mllm.recipe import Recipe, StageSpec
from mllm.train.added_rows import rows_line
from mllm.train.data import PADDED_TO, check_some_rows, open_mixture, token_count
from mllm.train.engine.base import choose_engine
from mllm.train.engine.groups import Group, apply_learning, frozen_summary
from mllm.train.engine.optim import state_bytes
from mllm.train.observe.flops import flop_model
from mllm.train.preflight.encoder_memory import kept_by_encoders
from mllm.train.preflight.engines import ENCODERS_ALONE, possible_engines
from mllm.train.preflight.head_memory import kept_by_heads
from mllm.train.preflight.memory import answers_each, frozen_encoders, layers_of, memory_of, offloaded_by
from mllm.train.preflight.scaling import ENGINES, Load, fastest_that_fits
from mllm.train.stages.kind import kind_of
from mllm.types import Video, VisualLayout

# Bytes per token and layer in bf16: (per hidden width, per feed-forward width). Compiled layers keep no fp32 copies in norms.
_ACTIVATION_BYTES = {"eager": (26.0, 8.0), "compiled": (16.0, 6.0)}
_FROZEN_SHARE = 0.6  # of that, when gradients only pass through: inputs of matrix products need not be kept
_SAMPLED_ROWS = 256
ROOM = 0.92
"""Share of a GPU's memory that a plan may fill: CUDA's context, fragments between blocks."""
_EVEN_ATTENTION = 1 / 3
"""Below this share of 1 / sqrt(width), the first weights' spread lets queries and keys say almost nothing of one another."""


@dataclass
class StagePlan:
    """One stage's figures. Memory in bytes of one GPU; flops of one optimizer step over all processes."""

    name: str
    groups: list[Group]
    frozen: dict[str, int]
    memory: dict[str, int]
    flops_step: float
    flops_step_language_model: float
    tokens_step: int
    rows_step: int = 0
    """Samples (rows when packing) of one optimizer step over all processes."""
    row_length: int = 0
    """Tokens of the longest row that memory is stated for."""
    accumulates: bool = False
    """Gradients stay while the next micro-batch's activations are made."""
    samples: int | None = None
    steps: int | None = None
    lengths: list[int] = field(default_factory=list)
    """Tokens of some samples (before truncation)."""
    image_tokens: list[int] = field(default_factory=list)
    """Tokens of the pictures of samples looked at, where they depend on the picture's size."""
    with_images: int = 0
    """How many of those have a picture or a video."""
    with_videos: int = 0
    truncated: float | None = None
    """Share of samples longer than ``max_length``."""
    checkpoint_bytes: int = 0
    rows: str | None = None
    """How many rows of added tokens learn, or why none does."""
    hazards: list[str] = field(default_factory=list)
    engine: str = ""
    """What ``engine: auto`` becomes; empty where the recipe names one."""
    offloaded: dict[str, int] = field(default_factory=dict)
    """What one process keeps outside its GPU, in bytes."""
    memory_for: Callable[[str, int], dict[str, int]] | None = None
    """``memory`` for another (engine, number of GPUs)."""
    load: Load | None = None
    """A step's work on one GPU."""
    engines: tuple[str, ...] = ()
    """What this stage can be trained with."""

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return peak_of(self.memory, accumulates=self.accumulates)

    def peak_for(self, engine: str, gpus: int) -> int:
        """`peak` with another engine on so many GPUs."""
        assert self.memory_for is not None
        return peak_of(self.memory_for(engine, gpus), accumulates=self.accumulates)

    def seconds(self, *, peak_flops: float, mfu: float, processes: int) -> float | None:
        """Time of the stage at a model FLOP utilisation of the language model alone."""
        if self.steps is None:
            return None
        return self.steps * self.flops_step_language_model / (peak_flops * mfu * processes)


def peak_of(memory: dict[str, int], *, accumulates: bool) -> int:
    """What stays, and the larger of the backward pass and the update. Where nothing is accumulated, gradients appear while
    activations go."""
    stays = sum(v for k, v in memory.items() if k not in ("activations and loss", "update", "gradients"))
    backward = memory["activations and loss"] + (memory["gradients"] if accumulates else 0)
    return stays + max(backward, memory["gradients"] + memory["update"])


@dataclass
class RecipePlan:
    """Everything `mllm plan` shows."""

    recipe: str
    parameters: dict[str, int]
    joins: list[str]
    stages: list[StagePlan]
    hazards: list[str]
    final_bytes: int


def plan_recipe(
    recipe: Recipe, *, processes: int = 1, with_data: bool = True, gpu_memory: float = 80e9, decoder_bytes: int = 0
) -> RecipePlan:
    """Plan a recipe for so many GPUs. with_data: look at the stages' data where they are on this machine. gpu_memory: bytes of one
    GPU, which ``engine: auto`` is chosen for. decoder_bytes: of the diffusion decoder that is saved with the model.

    Raises `ConfigError` for what would end training at its start.
    """
    config, processor, problem = config_and_processor_here(recipe)
    hazards = [] if problem is None else [problem]
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = model.part_of(name)
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    stages, clean = [], True
    for stage in recipe.stages:
        if not clean:  # the stage before put adapters in
            with torch.device("meta"):
                model = MllmForConditionalGeneration(config)
        stages.append(_plan_stage(recipe, stage, model, processor, processes, with_data, gpu_memory))
        clean = not has_adapters(model)
    hazards += _recipe_hazards(recipe, parameters)
    hazards += licence_warnings({n: encoder_config(spec, where=f"encoders.{n}") for n, spec in config.encoders.items()})
    final = (2 if recipe.stages[-1].dtype == "bfloat16" else 4) * sum(parameters.values()) + decoder_bytes
    return RecipePlan(recipe.name, parameters, _joins(config), stages, hazards, final)


def config_and_processor_here(recipe: Recipe) -> tuple[MllmConfig, Any, str | None]:
    """Config and processor, as far as this machine has the tokenizer: planning fetches nothing. The vocabulary is that of
    the model in training; without the tokenizer, its source's."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        config, processor = config_and_processor(recipe.model, load_tokenizer(recipe.model.text_model))
        text = config.text_config
        text.vocab_size = grown(num_token_ids(processor.tokenizer), text.vocab_size)
        return config, processor, None
    except ConfigError:
        raise
    except MllmError as error:
        problem = f"lengths are not known, the tokenizer is not on this machine: {error}; a folder: model.language_model.tokenizer=/folder"
    finally:
        hub.HF_HUB_OFFLINE = before
    return build_config(recipe.model), None, problem


def _joins(config: MllmConfig) -> list[str]:
    """One line for each thing that is handed on: pixels, grid, features, visual tokens."""
    lines = []
    for name, info in config.encoder_infos().items():
        rows, columns = info.grid
        lines.append(
            f"encoders.{name}: 3 × {info.image.height} × {info.image.width} pixels → {rows} × {columns} = {rows * columns} × {info.width}"
        )
    if config.connector is not None:
        width = config.get_text_config().hidden_size
        lines.append(
            f"connector ({config.connector['type']}): → {config.layout_rules().describe()} visual tokens × {width}"
        )
    return lines


def _plan_stage(
    recipe: Recipe,
    stage: StageSpec,
    model: MllmForConditionalGeneration,
    processor: Processor,
    processes: int,
    with_data: bool,
    gpu_memory: float,
) -> StagePlan:
    choice = choose_engine(stage)
    zero_stage = choice.zero_stage
    kind_of(stage).check_options(stage)
    groups = apply_learning(model, stage, zero_stage=zero_stage)
    micro_steps = stage.gradient_accumulation
    rows = stage.batch_size * micro_steps * processes
    plan = StagePlan(stage.name, groups, frozen_summary(model), {}, 0.0, 0.0, rows * stage.max_length)
    plan.rows, plan.rows_step = rows_line(model, stage), rows
    if with_data:
        _look_at_data(recipe, stage, plan, processor, rows)
    elif stage.steps is not None:
        plan.steps = stage.steps
    if stage.samples_per_step is not None:
        micro_steps = _micro_steps(stage, plan, processes)
        rows = stage.batch_size * micro_steps * processes
        plan.tokens_step, plan.rows_step = rows * stage.max_length, rows
    length = stage.max_length
    if plan.lengths and not stage.packing:
        length = min(length, round(float(np.mean(np.minimum(plan.lengths, stage.max_length)))))
    images = rows * (
        max(1, round(stage.max_length / max(np.mean(plan.lengths), 1))) if stage.packing and plan.lengths else 1
    )
    views = images * _most_views(model, plan) if model.config.connector is not None else 0
    plan.tokens_step = rows * length
    flops = flop_model(model, {group.part for group in groups})
    inner = float(np.mean(plan.lengths)) if stage.packing and plan.lengths else length
    if stage.kind in ENCODERS_ALONE:
        plan.tokens_step = 0
    step = flops.step(
        tokens=plan.tokens_step,
        squares=plan.tokens_step * inner,
        supervised=round(0.4 * plan.tokens_step),
        views=views,
    )
    plan.flops_step, plan.flops_step_language_model = step.total, step.language_model
    plan.row_length = _longest_row(stage, plan)
    passes = micro_steps * _parts(stage, length)
    plan.accumulates = micro_steps * _parts(stage, plan.row_length) > 1
    plan.memory_for = _memory_for(model, stage, groups, plan)
    learned, plan.engines = sum(group.num_parameters for group in groups), possible_engines(recipe, stage, model)
    if stage.engine == "auto":
        plan.engine = fastest_that_fits(
            lambda engine: plan.peak_for(engine, processes),
            ROOM * gpu_memory,
            plan.engines if processes > 1 else ("none",),
        )
        zero_stage = ENGINES[plan.engine]
    plan.memory = plan.memory_for(plan.engine or choice.kind, processes)
    plan.load = Load(
        operations=step.total / processes,
        learned=learned,
        weights=sum(p.numel() for p in model.parameters()),
        size=2 if stage.dtype == "bfloat16" else 4,
        micro_steps=passes,
        compiled=stage.compile and zero_stage != 3,
        again=stage.gradient_checkpointing,
    )
    plan.offloaded = offloaded_by(stage, plan.load.weights, learned, processes=processes)
    plan.checkpoint_bytes = 2 * learned * (4 + state_bytes(stage.optimizer))
    plan.hazards = _stage_hazards(recipe, stage, model, plan, zero_stage, rows)
    return plan


def _micro_steps(stage: StageSpec, plan: StagePlan, processes: int) -> int:
    """Micro-steps that a step's samples need when packed; where their lengths are not known, rows hold two."""
    mean = float(np.mean(np.minimum(plan.lengths, stage.max_length))) if plan.lengths else stage.max_length / 2
    rows = (stage.samples_per_step or 0) * mean / stage.max_length
    return max(1, round(rows / (stage.batch_size * processes) + 0.499))


def _parts(stage: StageSpec, row_length: int) -> int:
    """Batches that a micro-batch of such rows is computed in."""
    rows = stage.batch_size
    if stage.max_tokens_per_batch is not None:
        rows = max(1, min(rows, stage.max_tokens_per_batch // row_length))
    return -(-stage.batch_size // rows)


def _memory_for(
    model: MllmForConditionalGeneration, stage: StageSpec, groups: list[Group], plan: StagePlan
) -> Callable[[str, int], dict[str, int]]:
    """The model's numbers are taken now: a later stage of the plan changes it."""
    size = 2 if stage.dtype == "bfloat16" else 4
    weights, learned = sum(p.numel() for p in model.parameters()), sum(group.num_parameters for group in groups)
    whole, shared = (  # zero3 does not go with compiled layers
        _activations(model, stage, groups, size, plan, compiled=compiled) for compiled in (stage.compile, False)
    )
    still, accumulates, layers = frozen_encoders(plan.frozen, groups), plan.accumulates, layers_of(model.get_decoder())
    return lambda engine, n: memory_of(
        stage,
        weights,
        learned,
        shared if engine == "zero3" else whole,
        engine=engine,
        processes=n,
        encoders=still,
        accumulates=accumulates,
        layers=layers,
    )


def _largest_visual(model: MllmForConditionalGeneration, plan: StagePlan) -> VisualLayout:
    """The picture that takes the most tokens, or a video, but where the stage's data is here and has none."""
    rules = model.model.rules
    return rules.layout(rules.largest()) if plan.lengths and not plan.with_videos else rules.longest()


def _most_views(model: MllmForConditionalGeneration, plan: StagePlan) -> int:
    """Views of the largest visual; its patches, where pixels come as such."""
    rules, layout = model.model.rules, _largest_visual(model, plan)
    return max((layout.rows_of(name) for name in rules.images), default=layout.num_views)


def _longest_row(stage: StageSpec, plan: StagePlan) -> int:
    """Packed rows have max_length. Others are padded to the longest sample: of those looked at, a quarter more if there
    are others; max_length where no data is here."""
    if stage.packing or not plan.lengths:
        return stage.max_length
    longest = max(plan.lengths)
    if plan.samples is None or len(plan.lengths) < plan.samples:
        longest = longest * 5 // 4
    return min(stage.max_length, -(-longest // 8) * 8)


def _activations(
    model: MllmForConditionalGeneration,
    stage: StageSpec,
    groups: list[Group],
    size: int,
    plan: StagePlan,
    *,
    compiled: bool,
) -> int:
    config, row_length = model.config.get_text_config(), plan.row_length
    tokens = stage.batch_size * row_length
    if stage.max_tokens_per_batch is not None:
        tokens = min(tokens, max(stage.max_tokens_per_batch, row_length))
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    per_width, per_inner = _ACTIVATION_BYTES["compiled" if compiled else "eager"]
    layer = (per_width * width + per_inner * inner) * size / 2
    parts = {group.part for group in groups}
    if "language_model" not in parts:
        layer *= _FROZEN_SHARE
    kept = layer + size * width * layers if stage.gradient_checkpointing else layer * layers
    reads = stage.kind not in ENCODERS_ALONE
    memory = tokens * kept if reads else 0
    memory += kept_by_encoders(
        model, stage, parts, _largest_visual(model, plan), (per_width + 4 * per_inner) * size / 2, size
    )
    if not reads:
        return int(memory)
    memory += kept_by_heads(model, stage.batch_size, size)  # a mask a row
    chunk = min(DEFAULT_CHUNK, tokens)
    head = 8 * config.vocab_size * width if "language_model" in parts else 0
    return int(memory + chunk * config.vocab_size * (4 + size) + head)


def _look_at_data(recipe: Recipe, stage: StageSpec, plan: StagePlan, processor: Processor, rows: int) -> None:
    try:
        mixture = open_mixture(stage, recipe.seed)
    except (ConfigError, DataError) as error:
        plan.hazards.append(f"data cannot be read here, so memory is that of rows of max_length: {error}")
        plan.steps = stage.steps
        return
    plan.samples = len(mixture)
    plan.hazards += mixture.left_out()
    try:
        check_some_rows(mixture, stage)
    except DataError as error:
        plan.hazards.append(str(error))
    if processor is not None:
        first = Counter[int]()
        for draw in mixture.locate(range(min(_SAMPLED_ROWS, len(mixture)))):
            try:
                source = mixture.sources[draw.dataset]
                row = draw.row if source.shards is None else first[draw.dataset]  # of shards the first rows
                first[draw.dataset] += 1
                sample = source[row]
                with blamed_on(sample.id):
                    plan.lengths.append(token_count(processor, sample))
                plan.with_images += bool(sample.images)
                plan.with_videos += any(isinstance(one, Video) for one in sample.images)
                if processor.rules.needs_size and sample.images:
                    with blamed_on(sample.id):
                        read = split_images(sample.turns, sample.images, drawn=processor.span is not None)[0]
                        layouts = sample_layouts(processor, sample, read, f"sample {sample.id!r}")
                    plan.image_tokens += [layout.num_tokens for layout in layouts]
            except MllmError:
                continue
    if plan.lengths:
        plan.truncated = float(np.mean(np.array(plan.lengths) > stage.max_length))
    if stage.steps is not None:
        plan.steps = stage.steps
        return
    samples = stage.epochs * len(mixture) * answers_each(stage) if stage.epochs else 0
    if stage.samples_per_step is not None:
        plan.steps = max(1, -(-round(samples) // stage.samples_per_step))
        return
    if stage.packing and plan.lengths:
        samples *= float(np.mean(np.minimum(plan.lengths, stage.max_length))) / stage.max_length / 0.97
    plan.steps = max(1, round(samples / rows + 0.499))


def _stage_hazards(
    recipe: Recipe, stage: StageSpec, model: MllmForConditionalGeneration, plan: StagePlan, zero_stage: int, rows: int
) -> list[str]:
    hazards = list(plan.hazards)
    config = model.config.get_text_config()
    rules = model.config.layout_rules()
    tokens, what = rules.longest().num_tokens, "image" if rules.video is None else "video"
    if tokens + 16 > stage.max_length:
        hazards.append(f"max_length {stage.max_length} hardly holds one {what} of {tokens} tokens and a question")
    if stage.max_length > getattr(config, "max_position_embeddings", stage.max_length):
        hazards.append(
            f"max_length {stage.max_length} exceeds the language model's {config.max_position_embeddings} positions"
        )
    if zero_stage == 3 and recipe.model.router is not None:
        hazards.append(
            "zero3 with routed experts: every expert runs on every rank, one image for nothing; engines that keep encoders whole are "
            "faster (sharded, zero2, fsdp2)"
        )
    if zero_stage == 3 and stage.compile:
        hazards.append(
            "zero3, which auto takes here, runs without compile: about twice the time"
            if stage.engine == "auto"
            else "compile and zero3 exclude each other"
        )
    if rows % answers_each(stage):
        hazards.append(
            f"{rows} answers of a step (batch_size × gradient_accumulation × processes) are no whole number of questions of "
            f"{answers_each(stage)} (options.num_generations), which TRL refuses"
        )
    if stage.dtype == "float32" and sum(g.num_parameters for g in plan.groups) > 1e9:
        hazards.append("fp32 with more than a billion learning parameters: bf16 keeps fp32 copies where they matter")
    if stage.group_by_length and stage.compile and stage.max_tokens_per_batch is None and stage.batch_size > 1:
        mean = np.mean(np.minimum(plan.lengths, stage.max_length)) if plan.lengths else stage.max_length / 2
        most = max(stage.max_length, -(-round(stage.batch_size * mean) // PADDED_TO) * PADDED_TO)
        hazards.append(
            f"group_by_length with compile: the {stage.batch_size} longest samples meet in one batch, of {plan.row_length:,} tokens "
            "each, and what torch compiles for every other length may keep more than is counted here (a run was out of memory at "
            f"its second step); max_tokens_per_batch: {most} splits such batches"
        )
    hazards += odd_settings(stage, steps=plan.steps, samples=plan.samples, rows=rows)
    if plan.samples is not None and plan.samples < rows:
        hazards.append(f"{plan.samples} samples are fewer than the {rows} of one step")
    seeing = [group.part for group in plan.groups if group.part == "connector" or group.part.startswith("encoders.")]
    if seeing and plan.lengths and not plan.with_images:
        hazards.append(f"{seeing[0]} learns, and none of the {len(plan.lengths)} samples looked at has an image")
    if plan.truncated and plan.truncated > 0.02:
        hazards.append(f"{plan.truncated:.0%} of the samples looked at are longer than max_length {stage.max_length}")
    if not stage.packing and plan.lengths and np.mean(plan.lengths) < 0.5 * max(plan.lengths) and rows > 1:
        hazards.append("lengths differ widely: packing or group_by_length would save padding")
    return hazards


def _recipe_hazards(recipe: Recipe, parameters: dict[str, int]) -> list[str]:
    hazards = []
    ever = {part for stage in recipe.stages for part in stage.learn}
    for part in ("connector", "router", "slow_attention"):
        if part in parameters and part not in ever:
            hazards.append(f"{part} starts from random weights and learns in no stage")
    for name in heads_with_weights(recipe.model.heads):
        if f"heads.{name}" not in ever and "heads" not in ever:
            hazards.append(
                f"heads.{name} starts from random weights and learns in no stage; its loss teaches the other parts by chance"
            )
    for name, value in recipe.model.encoders.items():
        weights = value.get("weights", value.get("preset")) if isinstance(value, dict) else value
        if not weights and f"encoders.{name}" not in ever and "encoders" not in ever:
            hazards.append(f"encoders.{name} starts from random weights and learns in no stage")
    if recipe.model.text_model.source is None and "language_model" not in ever:
        hazards.append("language_model starts from random weights and learns in no stage")
    spec = recipe.model.language_model
    if spec is not None and spec.source is None and spec.config is not None:
        width, spread = spec.config.get("hidden_size"), spec.config.get("initializer_range", 0.02)
        if isinstance(width, int) and spread < _EVEN_ATTENTION / width**0.5:
            hazards.append(
                f"language_model starts from random weights of spread {spread} at width {width}: attention stays nearly even for long; "
                f"model.language_model.config.initializer_range={width**-0.5:.1g} learns sooner"
            )
    return hazards
