"""How is a vector written as a sum of codes, each for what the ones before left over?"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.visual_tokenizers.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    batch_usage,
    check_input,
    straight_through,
)
from mllm.visual_tokenizers.quantizers.codebook import Codebook, CodebookConfig
from mllm.visual_tokenizers.quantizers.search import nearest_codes


class ResidualQuantizerConfig(QuantizerConfig):
    """Residual vector quantisation (RQ-VAE, arXiv 2203.01941; DualToken, arXiv 2503.14324)."""

    type: str = "residual"
    size: int = Field(ge=2)
    dim: int = Field(ge=1)
    depth: int = Field(ge=1)
    shared: bool = True
    """One codebook for all depths."""
    codebook: CodebookConfig = Field(default_factory=lambda: CodebookConfig(learn="ema"))
    update: Literal["after_loop", "per_depth"] = "after_loop"
    """Moving-average books: after_loop updates once, from the residuals and codes of all depths together, so every
    code of a forward comes from one book; per_depth updates inside the loop, so later depths see the changed
    book."""
    beta: float = Field(default=1.0, ge=0)
    """Weight of the commitment loss: mean over depths of ``mean((z - sg partial sum)²)``."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """The same with the gradient to the book, for books that learn by gradient."""


class ResidualQuantizer(Quantizer):
    """D codes per position; the vector is the sum of their entries."""

    name = "residual"
    Config = ResidualQuantizerConfig
    config: ResidualQuantizerConfig

    def __init__(self, config: ResidualQuantizerConfig):
        super().__init__(config)
        self.size, self.dim, self.num_codes = config.size, config.dim, config.depth
        number = 1 if config.shared else config.depth
        self.books = nn.ModuleList(Codebook(config.codebook, config.size, config.dim) for _ in range(number))

    def book(self, depth: int) -> Codebook:
        """The codebook of one depth."""
        return self.books[0 if self.config.shared else depth]  # type: ignore[return-value]

    def forward(self, z: Tensor) -> QuantizerOutput:
        z = check_input(z, self.dim)
        config = self.config
        learning = self.training and torch.is_grad_enabled()
        residual = z.detach().flatten(0, 1)
        partial = torch.zeros_like(z)
        seen: list[tuple[Tensor, Tensor]] = []
        codes, commitment, codebook = [], [], []
        for depth in range(config.depth):
            table = self.book(depth).table()
            ids = nearest_codes(residual, table)
            # A copy is observed, not a view: the residual shrinks below, and every depth must count what it quantised.
            seen.append((residual, ids))
            chosen = F.embedding(ids, table).view_as(z)
            partial = partial + chosen
            residual = residual - chosen.detach().flatten(0, 1)
            commitment.append((z - partial.detach()).square())
            codebook.append((partial - z.detach()).square())
            codes.append(ids.view(z.shape[:2]))
            if learning and config.update == "per_depth":
                self.book(depth).observe(*seen[-1])
        if learning and config.update == "after_loop":
            self._observe_all(seen)
        losses = {"commitment": config.beta * _mean(commitment)}
        if config.codebook.learn != "ema":
            losses["codebook"] = config.codebook_weight * _mean(codebook)
        stacked = torch.stack(codes, -1)
        usage = batch_usage(stacked.flatten().view(-1, 1) if config.shared else stacked, self.size)
        return QuantizerOutput(straight_through(z, partial), stacked, losses, usage)

    def _observe_all(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        if self.config.shared:
            self.book(0).observe(torch.cat([r for r, _ in seen]), torch.cat([i for _, i in seen]))
            return
        for depth, (residual, ids) in enumerate(seen):
            self.book(depth).observe(residual, ids)

    def code_vectors(self, codes: Tensor) -> Tensor:
        self.check_codes(codes, partial=True)
        vectors = [F.embedding(codes[..., d], self.book(d).table()) for d in range(codes.shape[-1])]
        return torch.stack(vectors, dim=2)

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return self.code_vectors(codes).sum(2)


def _mean(per_depth: list[Tensor]) -> Tensor:
    stacked = torch.stack(per_depth)
    return stacked.mean() if stacked.numel() else stacked.sum()
