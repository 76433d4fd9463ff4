"""Which experts run when the choice is the same for every image?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from mllm.errors import did_you_mean
from mllm.routers import ROUTERS
from mllm.routers.base import Router, RouterConfig
from mllm.types import Routing


class ConstantConfig(RouterConfig):
    """Fixed weights."""

    type: str = "constant"
    weights: dict[str, float] = Field(default_factory=dict)
    """Expert → weight, scaled to sum 1; an expert left out has weight 0. Empty: all experts alike."""
    top_k: int = Field(default=1, ge=1)
    """Filled in: the number of experts with a weight."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "top_k" not in data:
            weights = data.get("weights") or dict.fromkeys(data.get("experts") or [], 1.0)
            if isinstance(weights, Mapping):
                positive = sum(1 for weight in weights.values() if isinstance(weight, int | float) and weight > 0)
                return {**data, "top_k": max(1, positive)}
        return data

    @model_validator(mode="after")
    def _known(self) -> ConstantConfig:
        for name, weight in self.weights.items():
            if name not in self.experts:
                known = ", ".join(self.experts)
                raise ValueError(f"weights: {name!r} is no expert{did_you_mean(name, self.experts)}. Experts: {known}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights.{name} is {weight}; a weight is 0 or a positive number")
        used = [name for name in self.experts if self.shares()[name] > 0]
        if len(used) > self.top_k:
            raise ValueError(
                f"top_k is {self.top_k}, but {len(used)} experts have a weight: {used}; remove top_k or weights"
            )
        return self

    def shares(self) -> dict[str, float]:
        """Expert → weight, sum 1 (all zero when every given weight is)."""
        weights = {name: self.weights.get(name, 0.0) if self.weights else 1.0 for name in self.experts}
        total = sum(weights.values())
        return {name: weight / total if total else 0.0 for name, weight in weights.items()}


@ROUTERS.register("constant")
class ConstantRouter(Router):
    """The same weights for every image; where ``allowed`` removes experts, the others share what is left."""

    Config = ConstantConfig
    config: ConstantConfig

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], int, int]:
        return {"type": "constant", "experts": ["a", "b", "c"], "weights": {"a": 3.0, "c": 1.0}}, 6, 8

    def forward(self, summary: Tensor, text: Tensor | None = None, allowed: Tensor | None = None) -> Routing:
        weights = summary.new_tensor(list(self.config.shares().values())).float() * self.read_allowed(summary, allowed)
        return Routing(self.experts, weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12))
