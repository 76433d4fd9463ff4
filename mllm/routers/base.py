"""What is a router here?"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.types import Routing


class RouterConfig(StrictModel):
    """What every router's config has."""

    type: str
    experts: list[str] = Field(min_length=1)
    """Names of the encoders that are routed; all other encoders always run."""
    top_k: int = Field(default=1, ge=1)


class Router(nn.Module):
    """Chooses which experts run on an image, from a summary of the image and of the question."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[RouterConfig]] = RouterConfig

    def __init__(self, config: Any, summary_width: int, text_width: int):
        """summary_width: channels of the image summary (the always-on encoders' mean features, concatenated);
        text_width: L."""
        super().__init__()
        self.config = config

    def forward(self, summary: Tensor, text: Tensor | None = None, allowed: Tensor | None = None) -> Routing:
        """summary ``(B, D)``, text ``(B, L)`` mean embedding of the question, allowed ``(B, E)`` bool → routing of B images;
        weights of chosen experts sum to 1 per image, all zero where none is chosen."""
        raise NotImplementedError
