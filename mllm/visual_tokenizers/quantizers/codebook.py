"""How does a codebook learn: by gradient, by moving averages, or frozen behind a linear map?"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.fp32_buffers import Fp32Buffers


class CodebookConfig(StrictModel):
    """How the entries of a codebook are held and learned."""

    learn: Literal["gradient", "ema", "frozen_linear"] = "gradient"
    """gradient: a parameter. ema: moving averages of what was assigned (van den Oord et al. 2017), summed over ranks.
    frozen_linear: a frozen random table behind a learned bias-free linear map (SimVQ, arXiv 2411.02038)."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    eps: float = Field(default=1e-5, gt=0)
    restart: bool = False
    """ema: an entry whose average count falls below ``restart_below`` is put on a random vector of the batch. A gradient
    book is restarted from the batch when an entry was not chosen for ``patience`` training steps."""
    restart_below: float = Field(default=1.0, gt=0)
    """Counts are vectors per step over all ranks, so 1 (as published) suits large batches; where a step holds few vectors
    per entry it would restart entries that are in use."""
    patience: int = Field(default=100, ge=1)
    init: Literal["uniform", "normal", "unit"] = "normal"
    """uniform: U(-1/K, 1/K). normal: N(0, 1/D). unit: normal rows scaled to length 1."""


class Codebook(Fp32Buffers):
    """``size`` vectors of ``dim`` channels. What moving averages hold is fp32 in a tokenizer of any dtype."""

    fp32_buffers = ("weight", "counts", "sums")

    weight: Tensor
    frozen: Tensor
    counts: Tensor
    sums: Tensor
    idle_steps: Tensor

    def __init__(self, config: CodebookConfig, size: int, dim: int):
        super().__init__()
        self.config, self.size, self.dim = config, size, dim
        start = self._initial(config, size, dim)
        if config.learn == "gradient":
            self.weight = nn.Parameter(start)
            if config.restart:
                self.register_buffer("idle_steps", torch.zeros(size, dtype=torch.int64))
        elif config.learn == "ema":
            self.register_buffer("weight", start)
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", start.clone())
        else:
            self.register_buffer("frozen", start)
            self.linear = nn.Linear(dim, dim, bias=False)

    @staticmethod
    def _initial(config: CodebookConfig, size: int, dim: int) -> Tensor:
        if config.init == "uniform":
            return (torch.rand(size, dim) * 2 - 1) / size
        values = torch.randn(size, dim) * dim**-0.5
        return nn.functional.normalize(values, dim=1) if config.init == "unit" else values

    def table(self) -> Tensor:
        """The entries ``(K, D)``, fp32, with gradient where they learn by it."""
        if self.config.learn == "frozen_linear":
            with torch.autocast(self.frozen.device.type, enabled=False):
                return nn.functional.linear(self.frozen.float(), self.linear.weight.float())
        return self.weight.float()

    @torch.no_grad()
    def observe(self, vectors: Tensor, ids: Tensor) -> None:
        """Learn from the assignment of ``vectors`` ``(M, D)`` to entries ``ids`` ``(M,)``: the moving-average step
        and the restart of dead entries. Sums over all ranks, so every rank holds the same book afterwards."""
        config = self.config
        if config.learn == "ema":
            counts, sums = assignment_sums(vectors, ids, self.size)
            self.counts.mul_(config.decay).add_(counts, alpha=1 - config.decay)
            self.sums.mul_(config.decay).add_(sums, alpha=1 - config.decay)
            if config.restart:
                dead = self.counts < config.restart_below
                if dead.any():
                    fresh = random_rows(vectors, self.size)
                    self.sums.copy_(torch.where(dead[:, None], fresh, self.sums))
                    self.counts.masked_fill_(dead, 1.0)
            total = self.counts.sum()
            smoothed = (self.counts + config.eps) / (total + self.size * config.eps) * total
            self.weight.copy_(self.sums / smoothed[:, None])
        elif config.learn == "gradient" and config.restart:
            counts, _ = assignment_sums(vectors, ids, self.size)
            self.idle_steps.copy_(torch.where(counts > 0, 0, self.idle_steps + 1))
            dead = self.idle_steps >= config.patience
            if dead.any():
                fresh = random_rows(vectors, self.size)
                self.weight.copy_(torch.where(dead[:, None], fresh.to(self.weight.dtype), self.weight))
                self.idle_steps.masked_fill_(dead, 0)

    @torch.no_grad()
    def set_entries(self, values: Tensor) -> None:
        """Put ``values`` ``(K, D)`` into the book (k-means or a published table); moving averages restart from them."""
        if self.config.learn == "frozen_linear":
            self.frozen.copy_(values)
            return
        self.weight.copy_(values)
        if self.config.learn == "ema":
            self.counts.fill_(1.0)
            self.sums.copy_(values)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def assignment_sums(vectors: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many vectors fell on each of ``size`` entries ``(K,)``, and their sums ``(K, D)``, over all ranks."""
    vectors = vectors.float()
    packed = torch.zeros(size, vectors.shape[1] + 1, device=vectors.device)
    packed.index_add_(0, ids, torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1))
    if _num_ranks() > 1:
        dist.all_reduce(packed)
    return packed[:, -1], packed[:, :-1]


def random_rows(vectors: Tensor, number: int) -> Tensor:
    """``number`` vectors drawn from ``vectors``; where there are too few, they repeat with small noise (0.01/√D of it).

    Rank 0 decides for all, so books stay equal.
    """
    vectors = vectors.float()
    if len(vectors) == 0:
        fresh = torch.randn(number, vectors.shape[1], device=vectors.device) * vectors.shape[1] ** -0.5
    else:
        repeats = -(-number // len(vectors))
        fresh = vectors.repeat(repeats, 1)
        if repeats > 1:
            fresh = fresh + torch.rand_like(fresh) * (0.01 * vectors.shape[1] ** -0.5)
        fresh = fresh[torch.randperm(len(fresh), device=fresh.device)[:number]]
    fresh = fresh.contiguous()
    if _num_ranks() > 1:
        dist.broadcast(fresh, src=0)
    return fresh


@torch.no_grad()
def kmeans(vectors: Tensor, number: int, *, steps: int = 10, seed: int = 0) -> Tensor:
    """``number`` cluster centres of ``vectors`` ``(M, D)`` by Lloyd's algorithm; empty clusters take a random
    vector."""
    from mllm.visual_tokenizers.quantizers.search import nearest_codes

    generator = torch.Generator(device="cpu").manual_seed(seed)
    vectors = vectors.float()
    picks = torch.randperm(len(vectors), generator=generator)[:number].to(vectors.device)
    centres = vectors[picks]
    if len(centres) < number:
        extra = torch.randint(len(vectors), (number - len(centres),), generator=generator).to(vectors.device)
        centres = torch.cat([centres, vectors[extra] + 1e-3 * torch.randn_like(vectors[extra])])
    for _ in range(steps):
        counts, sums = assignment_sums(vectors, nearest_codes(vectors, centres, refine=False), number)
        fresh = vectors[torch.randint(len(vectors), (number,), generator=generator).to(vectors.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], fresh)
    return centres
