"""What does one picture or clip cost a model before it answers: tokens, operations, weights?"""

from __future__ import annotations

from typing import Any

import torch

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import Recipe
from mllm.train.observe.flops import flop_model
from mllm.train.preflight.plan import config_and_processor_here


def picture_cost(recipe: Recipe) -> dict[str, Any]:
    """tokens: of the picture or clip with most views; frames: of the clip (0: a picture); vision, language: 10⁹ operations forward (a
    multiply-add is two) of encoders, connector and router, and of the language model over these tokens alone; millions: parameters. Of
    experts only as many are counted as run; what frames cost that see each other is counted as if each were seen alone. Everything on the
    meta device."""
    config, _, _ = config_and_processor_here(recipe)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    rules, flops = model.model.rules, flop_model(model, ())
    layout = rules.longest()
    experts = set(model.model.vision_tower.experts)
    always = sum(cost * layout.rows_of(name) for name, cost in flops.encoders.items() if name not in experts)
    of_experts = [cost * layout.rows_of(name) for name, cost in flops.encoders.items() if name in experts]
    running = int((config.router or {}).get("top_k") or len(of_experts))
    routed = running * sum(of_experts) / len(of_experts) if of_experts else 0.0
    count = layout.num_tokens
    joined = layout.num_views if layout.patches is None else layout.patches[0] * layout.patches[1]
    return {
        "tokens": count,
        "frames": layout.frames,
        "vision": (always + routed + flops.connector * joined) / 1e9,
        "language": (2.0 * flops.matmul * count + flops.attention * count**2) / 1e9,
        "millions": sum(p.numel() for p in model.parameters()) / 1e6,
    }
