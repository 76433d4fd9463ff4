"""What do encoders add to a step's loss, and what did its images cost the encoders that choose how far they run?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.heads.base import Step


def encoder_losses_of_step(bank: Any, step: Step) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The encoders' own losses (`VisionEncoder.losses`: means over images) as a part of one optimizer step, and
    ``encoders.<name>/<loss>`` → value to report. They count by this batch's share of the step's learned tokens, as a router's do."""
    total: Tensor | float = 0.0
    named: dict[str, Tensor] = {}
    for name, encoder in bank.encoders.items():
        for part, loss in encoder.losses().items():
            named[f"encoders.{name}/{part}"] = loss.detach()
            total = total + loss
    if named and step.num_items is not None and step.labels is not None:
        total = total * (step.labels[:, 1:].ne(-100).sum().to(torch.float32) / step.num_items)
    return total, named


def encoder_costs(model: nn.Module) -> dict[str, dict[str, float]]:
    """Encoder → what an image of the last call cost (`VisionEncoder.last_cost`), of the encoders whose work differs from call to
    call; empty for a model without such."""
    bank = getattr(getattr(model, "model", None), "vision_tower", None)
    encoders = getattr(bank, "encoders", None) or {}
    found = {name: encoder.last_cost() for name, encoder in encoders.items() if hasattr(encoder, "last_cost")}
    return {name: cost for name, cost in found.items() if cost}
