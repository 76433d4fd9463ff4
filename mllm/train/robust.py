"""How do pictures in training become harder: turned, and changed against the model by one gradient step?

The recipe of Brain-Score's dual-stream CrossViT (arXiv 2203.06649) for any model of ours: rotations, and fast adversarial training. It
hangs before the model's forward, so that engines, records and resuming stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm.config import StrictModel
from mllm.errors import ConfigError
from mllm.heads.base import MultimodalModel
from mllm.processing.pixel_keys import PixelKeys


class RobustOptions(StrictModel):
    """``options.robust`` of a stage."""

    rotations: bool = False
    """Turn a picture by 90 degrees with probability a half, then by 180 with a half. Questions about left and right lose their answers."""
    adversarial: bool = False
    """Before each batch is learned, one step of its pixels against the loss: a second forward and backward pass."""
    epsilon: float = Field(default=2.0, gt=0, le=16)
    """Largest change of a pixel, in 255ths."""
    pace: float = Field(default=2.5, gt=0)
    """Length of the step, in 255ths, from a random start."""


def turn(pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every picture ``(3, S, S)`` turned by a random number of quarters, the same for all encoders.

    Args:
        pixels: key → ``(B, 3, S, S)``, of the same pictures under every key.

    Raises:
        ConfigError: for pixels that cannot be turned in place.
    """
    shapes = {key: tuple(value.shape) for key, value in pixels.items()}
    counts = {shape[0] for shape in shapes.values()}
    wrong = [key for key, shape in shapes.items() if len(shape) != 4 or shape[2] != shape[3]]
    if wrong or len(counts) > 1:
        shown = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise ConfigError(
            f"options.robust.rotations: pictures must be squares, one view each, for every encoder; got {shown}"
        )
    count = counts.pop() if counts else 0
    quarters = ((torch.rand(count) < 0.5).long() + 2 * (torch.rand(count) < 0.5).long()).tolist()
    return {
        key: torch.stack([torch.rot90(x, k, (1, 2)) for x, k in zip(value, quarters)]) if count else value
        for key, value in pixels.items()
    }


class Robust:
    """A hook before the model's forward in training; ``attach`` it, and call what that gives to take it away."""

    def __init__(self, options: RobustOptions, model: MultimodalModel):
        self.options = options
        infos = model.model.vision_tower.infos
        self.keys = PixelKeys(infos)
        self.deviations = {self.keys[name]: info.image.std for name, info in infos.items()}
        self.inside = False

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Args: model: whose forward is hooked. Returns: a handle whose ``remove()`` ends it."""
        return model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        pixels = {key: inputs[key] for key in self.keys.values() if inputs.get(key) is not None}
        learns = model.training and torch.is_grad_enabled() and inputs.get("labels") is not None
        if self.inside or not learns or not any(len(value) for value in pixels.values()):
            return None
        if self.options.rotations:
            pixels = turn(pixels)
        if self.options.adversarial:
            pixels = self._against(model, {**inputs, **pixels}, pixels)
        return args, {**inputs, **pixels}

    def _against(self, model: Any, inputs: dict[str, Any], pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pixels within ``epsilon`` of the given ones, a step up the loss. Parameters get no gradient of it."""
        bounds, starts = {}, {}
        for key, value in pixels.items():
            unit = 1 / (255 * torch.tensor(self.deviations[key], device=value.device).view(3, 1, 1))
            bounds[key] = unit.to(value.dtype)
            noise = (2 * torch.rand(value.shape) - 1).to(value)
            starts[key] = (value + self.options.epsilon * bounds[key] * noise).requires_grad_()
        self.inside = True
        try:
            loss = model(**{**inputs, **starts}).loss
            gradients = torch.autograd.grad(loss, list(starts.values()), allow_unused=True)
        finally:
            self.inside = False
        found = {}
        for (key, value), gradient in zip(starts.items(), gradients, strict=True):
            limit = self.options.epsilon * bounds[key]
            moved = (
                value.detach()
                if gradient is None
                else value.detach() + self.options.pace * bounds[key] * gradient.sign()
            )
            found[key] = pixels[key] + torch.minimum(torch.maximum(moved - pixels[key], -limit), limit)
        return found
