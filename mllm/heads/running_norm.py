"""How is what all states share taken out of what one of them says?

A state that predicts a fixed token is nearly the same in every answer: the language model's last norm leaves a few percent of its size for
what the answer is about. Layers that read it from scratch follow the shared part and learn nothing for long.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.05
"""Share of a new batch in the running statistics, once as many batches were seen that their plain mean gives it less."""
EPS = 1e-5
ENOUGH = 8
"""States of which a mean and a deviation are worth something."""


class RunningNorm(nn.Module):
    """States ``(N, L)`` less their mean, over their deviation, dimension by dimension.

    In training these are the batch's own where it has `ENOUGH` states (the shared part moves faster than a running mean follows), and
    running ones else, so one state alone can be normalised; gradients pass through the batch's own. Answers use the running ones and
    depend on nothing but the checkpoint. Statistics are fp32 buffers; each process of a run keeps its own.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, states: Tensor) -> Tensor:
        """``(N, L)`` → the same shape and dtype."""
        values = states.float()
        if self.training and len(values):
            self._count(values.detach())
        if self.training and len(values) >= ENOUGH:
            mean, variance = values.mean(0), values.var(0, correction=0)
        else:
            mean, variance = self.mean.to(values.device), self.variance.to(values.device)
        return ((values - mean) * torch.rsqrt(variance + EPS)).to(states.dtype)

    @torch.no_grad()
    def _count(self, values: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=MOMENTUM).float()
        self.mean.lerp_(values.mean(0).to(self.mean.device), share)
        distances = (values - self.mean.to(values.device)).square().mean(0)
        self.variance.lerp_(distances.to(self.variance.device), share)
