"""How are codes made without a learned table: by signs, on the sphere, or on a fixed grid of levels?"""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from mllm.visual_tokenizers.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    batch_usage,
    check_input,
    straight_through,
)


class LookupFreeQuantizerConfig(QuantizerConfig):
    """Signs as bits: LFQ (MAGVIT-v2, arXiv 2310.05737); with ``spherical``, BSQ (arXiv 2406.07548)."""

    type: str = "lookup_free"
    dim: int = Field(ge=1)
    """Bits per position."""
    groups: int = Field(default=1, ge=1)
    """Codes per position: each takes dim/groups bits (at most 30, so that an id is a usable number)."""
    spherical: bool = False
    """Scale the input to length 1 and the corners to ``±1/√dim``."""
    beta: float = Field(default=0.25, ge=0)
    entropy_weight: float = Field(default=0.1, ge=0)
    """Weight of (mean entropy per position - entropy of the mean distribution). Bits are independent given the
    input, so the first term is exact; the second sums the bits' own entropies, an upper bound (BSQ, section
    3.2)."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the soft bits in the entropy term: smaller is harder."""

    @model_validator(mode="after")
    def _groups(self) -> LookupFreeQuantizerConfig:
        if self.dim % self.groups:
            raise ValueError(f"dim {self.dim} is not a multiple of groups {self.groups}")
        if self.dim // self.groups > 30:
            raise ValueError(f"{self.dim // self.groups} bits in one code; use more groups (at most 30 bits each)")
        return self


class LookupFreeQuantizer(Quantizer):
    """Bit i of a code is the sign of channel i of its group (bit 0 is the group's first channel)."""

    name = "lookup_free"
    Config = LookupFreeQuantizerConfig
    config: LookupFreeQuantizerConfig

    def __init__(self, config: LookupFreeQuantizerConfig):
        super().__init__(config)
        self.dim, self.num_codes = config.dim, config.groups
        self.bits = config.dim // config.groups
        self.size = 2**self.bits
        self.scale = config.dim**-0.5 if config.spherical else 1.0

    def _powers(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.bits, device=device)

    def forward(self, z: Tensor) -> QuantizerOutput:
        z = check_input(z, self.dim)
        if self.config.spherical:
            z = F.normalize(z, dim=-1)
        positive = z > 0
        quantized = torch.where(positive, self.scale, -self.scale).to(z.dtype)
        codes = (positive.unflatten(-1, (self.num_codes, self.bits)) * self._powers(z.device)).sum(-1)
        losses: dict[str, Tensor] = {}
        if z.numel():
            losses["commitment"] = self.config.beta * (z - quantized).square().mean()
            if self.config.entropy_weight > 0:
                # Softmax over -|z - c|²/τ of the two corners of one bit is a sigmoid of 4·z·scale/τ.
                logit = 4 * self.scale * z.flatten(0, 1) / self.config.temperature
                single = _bit_entropy(logit.sigmoid()).sum(-1).mean()
                together = _bit_entropy(logit.sigmoid().mean(0)).sum()
                losses["entropy"] = self.config.entropy_weight * (single - together)
        return QuantizerOutput(straight_through(z, quantized), codes, losses, batch_usage(codes, self.size))

    def code_vectors(self, codes: Tensor) -> Tensor:
        """``(B, n, q)`` → ``(B, n, q, bits)``."""
        self.check_codes(codes, partial=True)
        bits = (codes.unsqueeze(-1) >> torch.arange(self.bits, device=codes.device)) & 1
        return (bits * 2 - 1).float() * self.scale

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return self.code_vectors(codes).flatten(2)


def _bit_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


class FiniteScalarQuantizerConfig(QuantizerConfig):
    """Each channel rounded to one of a few levels (FSQ, arXiv 2309.15505)."""

    type: str = "finite_scalar"
    levels: tuple[int, ...] = Field(min_length=1)
    """Levels of each channel; ``[8, 5, 5, 5]`` makes 1000 codes."""

    @field_validator("levels")
    @classmethod
    def _levels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(level < 2 for level in value) or math.prod(value) > 2**30:
            raise ValueError("levels are 2 or more each, and their product at most 2^30")
        return value


class FiniteScalarQuantizer(Quantizer):
    """One code per position, a number in the mixed base of ``levels`` (the first channel counts ones). No losses."""

    name = "finite_scalar"
    Config = FiniteScalarQuantizerConfig
    config: FiniteScalarQuantizerConfig
    num_codes = 1

    def __init__(self, config: FiniteScalarQuantizerConfig):
        super().__init__(config)
        self.levels = tuple(config.levels)
        self.dim, self.size = len(self.levels), math.prod(self.levels)
        self.places = [math.prod(self.levels[:i]) for i in range(self.dim)]

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, device=like.device, dtype=torch.float32)

    def _bound(self, z: Tensor) -> Tensor:
        """Channel i into an interval whose rounding gives exactly ``levels[i]`` whole numbers."""
        levels = self._levels(z)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return (z + shift).tanh() * half - offset

    def forward(self, z: Tensor) -> QuantizerOutput:
        z = check_input(z, self.dim)
        bounded = self._bound(z)
        half = (self._levels(z) // 2).to(z.dtype)
        whole = straight_through(bounded, bounded.round())
        digits = (whole.detach() + half).round().long()
        codes = (digits * torch.tensor(self.places, device=z.device)).sum(-1, keepdim=True)
        return QuantizerOutput(whole / half, codes, {}, batch_usage(codes, self.size))

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        levels = torch.tensor(self.levels, device=codes.device)
        digits = (codes // torch.tensor(self.places, device=codes.device)) % levels
        half = levels // 2
        return (digits - half).float() / half

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.embed(codes).unsqueeze(2)
