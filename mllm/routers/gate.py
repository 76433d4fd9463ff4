"""How does a learned gate choose experts from an image summary and a question summary?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.errors import AlignmentError, ConfigError
from mllm.routers import ROUTERS
from mllm.routers.base import Router, RouterConfig
from mllm.routers.losses import LOSSES, LossName
from mllm.types import Routing


class GateConfig(RouterConfig):
    """MLP gate with top-k selection. SCOPE (arXiv 2510.12974): ``top_k: 1``, ``losses: {batch_entropy: …,
    instance_entropy: …}``."""

    type: str = "gate"
    inputs: Literal["both", "image", "text"] = "both"
    """What the gate looks at. A missing question counts as zeros under both."""
    hidden: int = Field(default=256, ge=1)
    depth: int = Field(default=2, ge=1)
    """Linear layers; 1: no hidden layer."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before the softmax."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on the logits, in training only."""
    explore: float = Field(default=0.0, ge=0, le=1)
    """In training, the share of images whose experts are a random set (of random size, 1 to all) instead of the gate's choice:
    so the other parts learn to live with any routing, before or while the gate learns."""
    threshold: float = Field(default=0.0, ge=0, lt=1)
    """In evaluation, an expert whose probability is below this does not run; then perhaps none does."""
    straight_through: bool | None = None
    """Weights keep their value but take the gradient of the plain probabilities. Default: where top_k is 1, since the
    one chosen weight is always 1 and would give the gate no gradient."""
    losses: dict[LossName, float] = Field(default_factory=dict)
    """Loss → its weight: load_balance, z_loss, batch_entropy, instance_entropy. Computed in training only."""

    @model_validator(mode="after")
    def _weights(self) -> GateConfig:
        for name, weight in self.losses.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"losses.{name} is {weight}; a loss has a positive weight, or is left out")
        return self


@ROUTERS.register("gate")
class GateRouter(Router):
    """Summary and question → logits → softmax over allowed experts → the k largest, scaled to sum 1."""

    Config = GateConfig
    config: GateConfig

    def __init__(self, config: GateConfig, summary_width: int, text_width: int):
        super().__init__(config, summary_width, text_width)
        self.image_width = summary_width if config.inputs != "text" else 0
        self.text_width = text_width if config.inputs != "image" else 0
        if self.image_width + self.text_width == 0:
            raise ConfigError(
                f"router gate: nothing to look at (inputs: {config.inputs}, image summary of width {summary_width}, "
                f"question summary of width {text_width}); keep one encoder out of experts, or set inputs: both"
            )
        widths = [self.image_width + self.text_width, *[config.hidden] * (config.depth - 1), len(config.experts)]
        self.image_norm = nn.LayerNorm(self.image_width) if self.image_width else None
        self.text_norm = nn.LayerNorm(self.text_width) if self.text_width else None
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.reset_parameters()

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], int, int]:
        losses = {"load_balance": 0.01, "z_loss": 0.001, "batch_entropy": 0.1, "instance_entropy": 0.1}
        return {"type": "gate", "experts": ["a", "b", "c"], "top_k": 2, "hidden": 8, "losses": losses}, 6, 8

    def logits(self, summary: Tensor, text: Tensor | None = None) -> Tensor:
        """``(B, E)`` in fp32, divided by the temperature."""
        parts = []
        dtype = next(self.mlp.parameters()).dtype
        if self.image_norm is not None:
            self._expect("image summary", summary, summary.shape[0], self.image_width)
            parts.append(self.image_norm(summary.to(dtype)))
        if self.text_norm is not None:
            if text is None:
                if self.config.inputs == "text":
                    raise AlignmentError("router gate looks at the question (inputs: text), but no question was given")
                parts.append(summary.new_zeros(summary.shape[0], self.text_width, dtype=dtype))
            else:
                self._expect("question summary", text, summary.shape[0], self.text_width)
                parts.append(self.text_norm(text.to(dtype)))
        return self.mlp(torch.cat(parts, dim=-1)).float() / self.config.temperature

    @staticmethod
    def _expect(what: str, value: Tensor, rows: int, width: int) -> None:
        if tuple(value.shape) != (rows, width):
            raise AlignmentError(f"router gate: {what} has shape {tuple(value.shape)}, expected {(rows, width)}")

    def forward(self, summary: Tensor, text: Tensor | None = None, allowed: Tensor | None = None) -> Routing:
        logits = self.logits(summary, text)
        open_experts = self.read_allowed(summary, allowed)
        noisy = logits
        learns = self.training and any(p.requires_grad for p in self.parameters())
        if learns and self.config.noise:
            noisy = logits + self.config.noise * torch.randn_like(logits)
        probabilities = masked_softmax(noisy, open_experts)
        weights = self.select(probabilities)
        if self.training and self.config.explore:
            explored = torch.rand(len(weights), 1, device=weights.device) < self.config.explore
            weights = torch.where(explored, random_weights(open_experts), weights)
        losses = {}
        if learns and self.config.losses:
            clean = masked_softmax(logits, open_experts)
            losses = {
                name: factor * LOSSES[name](logits, clean, weights, open_experts)
                for name, factor in self.config.losses.items()
            }
        return Routing(self.experts, weights, logits=logits, losses=losses)

    def select(self, probabilities: Tensor) -> Tensor:
        """Probabilities ``(B, E)`` (rows may be zero) → weights of the k largest; a row sums to 1 or is zero."""
        top, index = probabilities.topk(self.config.top_k, dim=-1)
        kept = top > 0
        if not self.training and self.config.threshold:
            kept = kept & (top >= self.config.threshold)
        top = torch.where(kept, top, 0.0)
        weights = top / torch.where(kept.any(dim=-1, keepdim=True), top.sum(dim=-1, keepdim=True), 1.0)
        through = self.config.straight_through
        if through or (through is None and self.config.top_k == 1):
            weights = weights.detach() + (top - top.detach())
        return torch.zeros_like(probabilities).scatter(-1, index, weights)

    def supervised_loss(self, routing: Routing, targets: Tensor) -> Tensor:
        """Cross-entropy of the gate with labels: ``(B,)`` integer class, or ``(B, E)`` multi-hot or soft, scaled to sum
        1 per row. Rows without a target (all zero, or class -100) are left out; a scalar, 0 with gradient when all
        are."""
        if routing.logits is None:
            raise AlignmentError("supervised_loss needs the gate's logits; this routing was not made by a gate")
        return routing_loss(routing.logits, targets)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed experts, zeros elsewhere; a row without any is zero."""
    floor = torch.finfo(logits.dtype).min
    return logits.masked_fill(~allowed, floor).softmax(dim=-1) * allowed


def random_weights(allowed: Tensor, most: int | None = None) -> Tensor:
    """Equal weights ``(B, E)`` on a random set of allowed experts, its size uniform from 1 to all of them (or ``most``)."""
    count = allowed.sum(dim=-1, keepdim=True).clamp_max(most or allowed.shape[-1])
    size = (torch.rand_like(count, dtype=torch.float32) * count).floor() + 1
    order = torch.rand_like(allowed, dtype=torch.float32).masked_fill(~allowed, 2.0).argsort(dim=-1).argsort(dim=-1)
    chosen = (order < size) & allowed
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(1)


def routing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``(B, E)`` with targets as in `GateRouter.supervised_loss`."""
    if targets.dim() == 1:
        rows = targets != -100
        targets = F.one_hot(targets.clamp_min(0), logits.shape[-1]) * rows[:, None]
    if targets.shape != logits.shape:
        raise AlignmentError(f"routing targets have shape {tuple(targets.shape)}, expected {tuple(logits.shape)}")
    targets = targets.to(logits)
    total = targets.sum(dim=-1, keepdim=True)
    shares = targets / torch.where(total > 0, total, 1.0)
    losses = -(shares * logits.log_softmax(dim=-1)).sum(dim=-1)
    return losses.sum() / (total > 0).sum().clamp_min(1)
