"""What will a visual tokenizer's training cost, and what is wrong with its recipe?

Memory is counted by what the engine keeps; activations and operations by running the tokenizer once on the meta device, which
computes nothing.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.errors import MllmError
from mllm.odd_settings import odd_settings
from mllm.recipe import Recipe, StageSpec
from mllm.train.engine.base import choose_engine
from mllm.train.engine.groups import apply_learning, frozen_summary
from mllm.train.preflight.plan import STATE_BYTES, RecipePlan, StagePlan
from mllm.train.stages.tokenizer.model import TokenizerModel
from mllm.train.stages.tokenizer.stage import odd_tokenizer_settings, training_without_networks
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.images import load_images
from mllm.visual_tokenizers.networks.discriminator import build_discriminator
from mllm.visual_tokenizers.recipe import TokenizerTraining, tokenizer_training


def plan_tokenizer(recipe: Recipe, *, processes: int = 1, with_data: bool = True) -> RecipePlan:
    """As `mllm.train.preflight.plan.plan_recipe`, for a recipe of tokenizer stages. Raises `ConfigError`."""
    stages, parameters, joins = [], {}, []
    for stage in recipe.stages:
        training = tokenizer_training(recipe, stage)
        with torch.device("meta"):
            model = TokenizerModel(build_tokenizer(training.tokenizer), training_without_networks(training), None, None)
        if not stages:
            parameters = _parameters(model)
            tokenizer = model.tokenizer
            joins.append(
                f"visual_tokenizer ({training.tokenizer['type']}): 3 × {tokenizer.image.height} × {tokenizer.image.width} pixels → "
                f"{tokenizer.tokens_per_image:,} codes, {tokenizer.bits_per_image:,.0f} bits"
            )
        stages.append(_plan_stage(training, stage, model, processes, with_data))
    hazards = []
    if all(stage.dtype == "bfloat16" for stage in recipe.stages):
        hazards.append("dtype bfloat16: the networks compute in it; weights, codebooks and the search stay in float32")
    return RecipePlan(recipe.name, parameters, joins, stages, hazards, 4 * sum(parameters.values()))


def _parameters(model: TokenizerModel) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.tokenizer.named_parameters():
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def _plan_stage(
    training: TokenizerTraining, stage: StageSpec, model: TokenizerModel, processes: int, with_data: bool
) -> StagePlan:
    zero_stage = choose_engine(stage).zero_stage
    groups = apply_learning(model, stage, zero_stage=zero_stage)
    rows, codes = stage.batch_size * stage.gradient_accumulation * processes, model.tokenizer.tokens_per_image
    plan = StagePlan(stage.name, groups, frozen_summary(model), {}, 0.0, 0.0, rows * codes)
    plan.row_length, plan.accumulates = codes, stage.gradient_accumulation > 1
    if with_data:
        try:
            plan.samples = len(load_images(training.images, model.tokenizer.image.height, "train"))
        except MllmError as error:
            plan.hazards.append(f"pictures cannot be read here: {error}")
    plan.steps = stage.steps
    if plan.steps is None and plan.samples is not None:
        plan.steps = max(1, -(-round(float(stage.epochs or 1) * plan.samples) // rows))
    learned, total = sum(g.num_parameters for g in groups), sum(p.numel() for p in model.parameters())
    share, states = processes if zero_stage else 1, STATE_BYTES[stage.optimizer.type] + (4 if zero_stage else 0)
    activations, forward = _run_once(model, stage)
    plan.memory = {
        "weights": 4 * total,
        "gradients": 4 * learned // (processes if zero_stage >= 2 else 1),
        "optimizer states": states * learned // share + (4 * learned if stage.optimizer.ema is not None else 0),
        "activations and loss": activations,
        "update": 4 * learned // share,
    }
    adversarial = training.losses.adversarial
    if adversarial is not None:
        with torch.device("meta"):
            network = build_discriminator(adversarial.discriminator)
        plan.memory["discriminator"] = 16 * sum(p.numel() for p in network.parameters())
    plan.flops_step = plan.flops_step_language_model = 3.0 * forward * stage.gradient_accumulation * processes
    plan.checkpoint_bytes = 2 * learned * (4 + STATE_BYTES[stage.optimizer.type])
    plan.hazards += odd_settings(stage, steps=plan.steps, samples=plan.samples, rows=rows)
    plan.hazards += odd_tokenizer_settings(training, plan.steps) if plan.steps is not None else []
    if not activations:
        plan.hazards.append("activations are not known: this tokenizer does not run on the meta device")
    if training.teacher is not None or training.losses.perceptual is not None:
        plan.hazards.append("teacher and perceptual network are left out of memory and operations")
    return plan


def _run_once(model: TokenizerModel, stage: StageSpec) -> tuple[int, float]:
    """Bytes that a micro-batch's forward pass keeps, and its operations; (0, 0) for a tokenizer that cannot run on meta."""
    size, kept = model.tokenizer.image, 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    pixels = torch.zeros(stage.batch_size, 3, size.height, size.width, dtype=torch.uint8, device="meta")
    model.eval()  # moving averages of codebooks look at numbers, of which meta has none
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(num_items_in_batch=stage.batch_size, pixel_values=pixels)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return 0, 0.0
    return (kept // 2 if stage.dtype == "bfloat16" else kept), float(counter.get_total_flops())
