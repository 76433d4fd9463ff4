"""What is a router here?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import AlignmentError
from mllm.types import Routing


class RouterConfig(StrictModel):
    """What every router's config has."""

    type: str
    experts: list[str] = Field(min_length=1)
    """Names of the encoders that are routed; all other encoders always run."""
    top_k: int = Field(default=1, ge=1)
    """Most experts that run on one image."""

    @model_validator(mode="after")
    def _pool(self) -> RouterConfig:
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts: names must differ, got {self.experts}")
        if self.top_k > len(self.experts):
            raise ValueError(f"top_k is {self.top_k}, but there are {len(self.experts)} experts: {self.experts}")
        return self


class Router(nn.Module):
    """Chooses which experts run on an image, from a summary of the image and of the question."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[RouterConfig]] = RouterConfig
    config: RouterConfig
    asks_language_model: ClassVar[bool] = False
    """Whether the language model decides in a first pass of its own (`mllm.models.routing.ask_language_model`)."""
    trains_when_frozen: ClassVar[bool] = True
    """A stage in which other parts learn leaves a frozen router in training mode: ``explore`` is for those parts."""

    def __init__(self, config: RouterConfig, summary_width: int, text_width: int):
        """summary_width: channels of the image summary (the always-on encoders' mean features, concatenated);
        text_width: L."""
        super().__init__()
        self.config = config

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts' names in the order of the weights' columns."""
        return tuple(self.config.experts)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], int, int]:
        """The smallest sensible (config, summary_width, text_width); the contract tests build it."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fresh initial values for every parameter, for instance after building on the meta device."""
        for module in reversed(list(self.modules())):
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def read_allowed(self, summary: Tensor, allowed: Tensor | None) -> Tensor:
        """The experts that may run.

        Args:
            summary: ``(B, D)``, for its size and device.
            allowed: ``(B, E)``; None: all.

        Returns:
            ``(B, E)`` bool on the summary's device.

        Raises:
            AlignmentError: another shape.
        """
        shape = (summary.shape[0], len(self.config.experts))
        if allowed is None:
            return torch.ones(shape, dtype=torch.bool, device=summary.device)
        if tuple(allowed.shape) != shape:
            raise AlignmentError(f"allowed has shape {tuple(allowed.shape)}, expected (images, experts) = {shape}")
        return allowed.to(summary.device, torch.bool)

    def forward(self, summary: Tensor, text: Tensor | None = None, allowed: Tensor | None = None) -> Routing:
        """Choose experts for B images.

        Args:
            summary: ``(B, D)``, the always-on encoders' mean features.
            text: ``(B, L)``, mean embedding of the question.
            allowed: ``(B, E)`` bool, experts that may run; None: all.

        Returns:
            Weights of chosen experts sum to 1 per image, all zero where none is chosen.
        """
        raise NotImplementedError
