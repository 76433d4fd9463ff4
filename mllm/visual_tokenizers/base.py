"""What is a visual tokenizer here?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.types import Grid, ImageSpec, VisualCodes


class VisualTokenizerConfig(StrictModel):
    """What every visual tokenizer's config has."""

    type: str


@dataclass
class TokenizerOutput:
    """reconstruction ``(B, 3, H, W)`` in [-1, 1]; losses: named scalars."""

    reconstruction: Tensor
    codes: VisualCodes
    losses: dict[str, Tensor]


class VisualTokenizer(nn.Module):
    """Image ↔ discrete codes. Pixels are in [-1, 1] (mean and std 0.5)."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[VisualTokenizerConfig]] = VisualTokenizerConfig

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    image: ImageSpec
    grid: Grid
    codebooks: dict[str, tuple[int, int]]
    """Codebook name → (size, codes per position)."""

    def encode(self, pixels: Tensor) -> VisualCodes:
        """``(B, 3, H, W)`` → codes."""
        raise NotImplementedError

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        """codes → codebook name → ``(B, N, D)``: the sum over depth or scales, the features a language model reads."""
        raise NotImplementedError

    def decode(self, codes: VisualCodes) -> Tensor:
        """codes → pixels ``(B, 3, H, W)`` in [-1, 1]. Raises `ConfigError` for ids out of range or a wrong grid."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruction, codes and the losses that need no other network."""
        raise NotImplementedError
