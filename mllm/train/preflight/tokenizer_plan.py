"""What will the training of a visual tokenizer, or of a diffusion decoder beside it, cost, and what is wrong with its recipe?

Memory is counted by what the engine keeps; activations and operations by running the networks once on the meta device, which
computes nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mllm.errors import MllmError
from mllm.odd_settings import odd_settings
from mllm.recipe import Recipe, StageSpec, reader_of
from mllm.train.engine.base import choose_engine
from mllm.train.engine.groups import apply_learning, frozen_summary
from mllm.train.engine.optim import state_bytes
from mllm.train.preflight.plan import RecipePlan, StagePlan
from mllm.train.stages.diffusion.model import DiffusionModel
from mllm.train.stages.diffusion.stage import odd_diffusion_settings
from mllm.train.stages.tokenizer.model import TokenizerModel
from mllm.train.stages.tokenizer.stage import odd_tokenizer_settings, training_without_networks
from mllm.visual_tokenizers.base import DECODER_WEIGHTS, build_tokenizer
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from mllm.visual_tokenizers.images import load_images
from mllm.visual_tokenizers.networks.discriminator import build_discriminator
from mllm.visual_tokenizers.recipe import (
    TokenizerTraining,
    diffusion_training,
    stage_images,
    tokenizer_training,
)


def plan_tokenizer(recipe: Recipe, *, processes: int = 1, with_data: bool = True) -> RecipePlan:
    """As `mllm.train.preflight.plan.plan_recipe`, for a recipe of tokenizer and diffusion stages. Raises `ConfigError`."""
    stages, parameters, joins = [], {}, []
    for stage in recipe.stages:
        model = _on_meta(recipe, stage)
        found = _parameters(model)
        if not stages:
            tokenizer = model.tokenizer
            joins.append(
                f"visual_tokenizer ({tokenizer.config.type}): 3 × {tokenizer.image.height} × {tokenizer.image.width} pixels → "
                f"{tokenizer.tokens_per_image:,} codes, {tokenizer.bits_per_image:,.0f} bits"
            )
        if isinstance(model, DiffusionModel):
            decoder, (rows, columns) = model.decoder, model.decoder.size
            joins.append(
                f"diffusion_decoder ({decoder.config.network}, {decoder.config.objective}): denoises {decoder.channels} × {rows} × "
                f"{columns} beside {', '.join(decoder.config.conditions)}"
            )
        parameters |= found
        stages.append(_plan_stage(recipe, stage, model, processes, with_data))
    hazards = []
    if all(stage.dtype == "bfloat16" for stage in recipe.stages):
        hazards.append("dtype bfloat16: the networks compute in it; weights, codebooks and the search stay in float32")
    return RecipePlan(recipe.name, parameters, joins, stages, hazards, 4 * sum(parameters.values()))


def decoder_bytes_of(recipe: Recipe) -> int:
    """Of the diffusion decoder in the folder that the model's visual tokenizer comes from; 0 where there is none."""
    holder, spec = reader_of(recipe.model.visual_tokenizer), recipe.model.visual_tokenizer
    if holder is not None:
        encoder = recipe.model.encoders.get(holder)
        spec = encoder if isinstance(encoder, dict) else None
    weights = (spec or {}).get("weights")
    folder = weights.get("source") if isinstance(weights, dict) else weights
    path = Path(folder) / DECODER_WEIGHTS if isinstance(folder, str) else None
    return path.stat().st_size if path is not None and path.is_file() else 0


def _on_meta(recipe: Recipe, stage: StageSpec) -> TokenizerModel | DiffusionModel:
    with torch.device("meta"):
        if stage.kind == "diffusion":
            beside = diffusion_training(recipe, stage)
            decoder = DiffusionDecoder(beside.options.decoder, build_tokenizer(beside.tokenizer))
            return DiffusionModel(decoder, beside)
        training = tokenizer_training(recipe, stage)
        return TokenizerModel(build_tokenizer(training.tokenizer), training_without_networks(training), None, None)


def _side(model: TokenizerModel | DiffusionModel) -> int:
    """Rows of the pictures that a stage learns from."""
    return model.decoder.image_side if isinstance(model, DiffusionModel) else model.tokenizer.image.height


def _parameters(model: TokenizerModel | DiffusionModel) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.tokenizer.named_parameters():
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    if isinstance(model, DiffusionModel):
        for name, child in model.decoder.named_children():
            found[f"diffusion_decoder.{name}"] = sum(p.numel() for p in child.parameters())
    return found


def _plan_stage(
    recipe: Recipe, stage: StageSpec, model: TokenizerModel | DiffusionModel, processes: int, with_data: bool
) -> StagePlan:
    choice = choose_engine(stage)
    zero_stage = choice.zero_stage
    groups = apply_learning(model, stage, zero_stage=zero_stage)
    rows, codes = stage.batch_size * stage.gradient_accumulation * processes, model.tokenizer.tokens_per_image
    plan = StagePlan(stage.name, groups, frozen_summary(model), {}, 0.0, 0.0, rows * codes)
    plan.row_length, plan.accumulates = codes, stage.gradient_accumulation > 1
    if with_data:
        try:
            plan.samples = len(load_images(stage_images(stage), _side(model), "train"))
        except MllmError as error:
            plan.hazards.append(f"pictures cannot be read here: {error}")
    plan.steps = stage.steps
    if plan.steps is None and plan.samples is not None:
        plan.steps = max(1, -(-round(float(stage.epochs or 1) * plan.samples) // rows))
    learned, total = sum(g.num_parameters for g in groups), sum(p.numel() for p in model.parameters())
    share, states = 1 if choice.kind == "none" else processes, state_bytes(stage.optimizer) + (4 if zero_stage else 0)
    activations, operations = _run_once(model, stage)
    plan.memory = {
        "weights": 4 * total,
        "gradients": 4 * learned // (processes if zero_stage >= 2 else 1),
        "optimizer states": (states + (4 if stage.optimizer.ema is not None else 0)) * learned // share,
        "activations and loss": activations,
        "update": 4 * learned // share,
    }
    plan.flops_step = plan.flops_step_language_model = operations * stage.gradient_accumulation * processes
    plan.checkpoint_bytes = 2 * learned * (4 + state_bytes(stage.optimizer))
    plan.hazards += odd_settings(stage, steps=plan.steps, samples=plan.samples, rows=rows)
    if not activations:
        plan.hazards.append("activations are not known: this tokenizer does not run on the meta device")
    if isinstance(model, DiffusionModel):
        _add_diffusion(plan, model)
    else:
        _add_tokenizer(plan, tokenizer_training(recipe, stage))
    return plan


def _add_diffusion(plan: StagePlan, model: DiffusionModel) -> None:
    if plan.steps is not None:
        plan.hazards += odd_diffusion_settings(model.training_spec, plan.steps, model.decoder)
    plan.hazards.append("the frozen tokenizer is left out of operations, and of activations, of which it keeps none")


def _add_tokenizer(plan: StagePlan, training: TokenizerTraining) -> None:
    """What stands beside the tokenizer: the discriminator's memory, and what is left out."""
    adversarial = training.losses.adversarial
    if adversarial is not None:
        with torch.device("meta"):
            network = build_discriminator(adversarial.discriminator)
        plan.memory["discriminator"] = 16 * sum(p.numel() for p in network.parameters())
    plan.hazards += odd_tokenizer_settings(training, plan.steps) if plan.steps is not None else []
    if training.teacher is not None or training.losses.perceptual is not None:
        plan.hazards.append("teacher and perceptual network are left out of memory and operations")


def _run_once(model: TokenizerModel | DiffusionModel, stage: StageSpec) -> tuple[int, float]:
    """Bytes that a micro-batch's forward pass keeps, and operations of forward and backward; (0, 0) for a tokenizer that cannot run on
    meta."""
    side, kept = _side(model), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    pixels = torch.zeros(stage.batch_size, 3, side, side, dtype=torch.uint8, device="meta")
    model.eval()  # moving averages of codebooks look at numbers, of which meta has none
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(num_items_in_batch=stage.batch_size, pixel_values=pixels)
        with FlopCounterMode(display=False) as frozen:
            if isinstance(model, DiffusionModel):
                model.decoder.to_space(pixels.float())
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return 0, 0.0
    operations = 3.0 * counter.get_total_flops() - 2.0 * frozen.get_total_flops()
    return (kept // 2 if stage.dtype == "bfloat16" else kept), operations
