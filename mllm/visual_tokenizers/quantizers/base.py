"""What is a quantizer here?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import ConfigError


class QuantizerConfig(StrictModel):
    """What every quantizer's config has."""

    type: str


@dataclass
class QuantizerOutput:
    """quantized: ``(B, N, D)``, straight-through; codes: ``(B, N', Q)`` int64 (N' == N except for multi-scale codes).

    losses: named scalars, already weighted by the quantizer's own config; usage: named scalars of this batch
    (``usage``: share of the codes that occur, ``perplexity``: exp of the codes' entropy), without gradient.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Continuous vectors ↔ discrete codes. Arithmetic is fp32 whatever the input's type."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[QuantizerConfig]] = QuantizerConfig
    config: QuantizerConfig

    dim: int
    """D: channels of a vector."""
    size: int
    """Number of different codes at one place."""
    num_codes: int
    """Q: codes per position."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z ``(B, N, D)`` → codes and their vectors. B = 0 is legal."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """z ``(B, N, D)`` → the codes ``(B, N', Q)`` of `forward` alone, without its losses and usages."""
        return self(z).codes

    def embed(self, codes: Tensor) -> Tensor:
        """codes ``(B, N', Q)`` → ``(B, N, D)``, the sum over depth or scales. Raises `ConfigError` for ids out of
        range."""
        raise NotImplementedError

    def code_vectors(self, codes: Tensor) -> Tensor:
        """codes ``(B, n, q)`` → ``(B, n, q, D')``: the vector of every single code, of any number of positions and
        of the first q of Q codes (D' is smaller than D where codes cover separate channels)."""
        raise NotImplementedError

    def check_codes(self, codes: Tensor, *, partial: bool = False) -> None:
        """Raises `ConfigError` for a wrong shape, type or an id that does not exist. partial: the first q of Q
        codes will do."""
        fits = codes.dim() == 3 and (
            codes.shape[-1] == self.num_codes or (partial and codes.shape[-1] < self.num_codes)
        )
        if not fits:
            raise ConfigError(f"codes must be (B, N, {self.num_codes}), got {tuple(codes.shape)}")
        if codes.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"codes must be whole numbers (int64), got {codes.dtype}")
        if codes.numel():
            low, high = torch.stack(codes.aminmax()).tolist()
            if low < 0 or high >= self.size:
                bad = low if low < 0 else high
                raise ConfigError(f"code id {bad} is out of range: this codebook has ids 0 to {self.size - 1}")


def check_input(z: Tensor, dim: int) -> Tensor:
    """``z`` as float32. Raises `ConfigError` when it is not ``(B, N, dim)``."""
    if z.dim() != 3 or z.shape[-1] != dim:
        raise ConfigError(f"a quantizer of dim {dim} takes (B, N, {dim}), got {tuple(z.shape)}")
    return z.float()


@torch.no_grad()
def batch_usage(codes: Tensor, size: int) -> dict[str, Tensor]:
    """Share of codes that occur and perplexity of a batch's ids, averaged over the last axis (Q books).

    Above 2^20 codes only the number of different ids is counted, relative to the most that the batch could hold.
    """
    books = codes.reshape(-1, codes.shape[-1])
    usage, perplexity = [], []
    for ids in books.unbind(1):
        if size <= 2**20:
            # Not bincount, which waits for the device to learn its output's size (and has no meta version, for plans).
            counts = ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids)).float()
            possible = size
        else:
            counts = torch.unique(ids, return_counts=True)[1].float()
            possible = max(1, min(size, ids.numel()))
        share = counts / counts.sum().clamp_min(1)
        usage.append((counts > 0).float().sum() / possible)
        perplexity.append(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
    return {"usage": torch.stack(usage).mean(), "perplexity": torch.stack(perplexity).mean()}


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in value, ``z`` in gradient."""
    return z + (quantized - z).detach()
