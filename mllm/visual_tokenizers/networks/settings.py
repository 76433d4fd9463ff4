"""Which settings of a tokenizer's networks does a recipe hold? Read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mllm.config import StrictModel


class DiscriminatorConfig(StrictModel):
    type: Literal["patch", "residual"] = "patch"
    """patch: PatchGAN with batch norm (TokenFlow, VQGAN). residual: group-norm residual blocks (DualToken)."""
    channels: int = Field(default=64, ge=1)
    num_layers: int = Field(default=3, ge=1)
