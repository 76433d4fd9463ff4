"""How is what all states share taken out of what one of them says?

A state that predicts a fixed token is nearly the same in every answer: the language model's last norm leaves a few percent of its size for
what the answer is about. Layers that read it from scratch follow the shared part and learn nothing for long.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm.fp32_buffers import Fp32Buffers
from mllm.heads.base import heads_of

MOMENTUM = 0.05
"""Share of a new batch in the running statistics, once as many batches were seen that their plain mean gives it less."""
EPS = 1e-5
ENOUGH = 8
"""States of which a mean and a deviation are worth something."""


class RunningNorm(Fp32Buffers):
    """States ``(N, L)`` less their mean, over their deviation, dimension by dimension.

    In training these are the batch's own where it has `ENOUGH` states (the shared part moves faster than a running mean follows), and
    running ones else, so one state alone can be normalised; gradients pass through the batch's own. Answers use the running ones and
    depend on nothing but the checkpoint. Statistics are fp32 buffers in a model of any dtype. Each process of a run normalises with its own
    batch, as a batch norm does; running statistics are made one after every step (`share_statistics`).
    """

    fp32_buffers = ("mean", "variance")
    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.counted = 0
        """States since `share_statistics`."""

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
        self.counted += len(values)
        share = (1 / self.batches).clamp(min=MOMENTUM).float()
        self.mean.lerp_(values.mean(0).to(self.mean.device), share)
        distances = (values - self.mean.to(values.device)).square().mean(0)
        self.variance.lerp_(distances.to(self.variance.device), share)


@torch.no_grad()
def share_statistics(model: nn.Module) -> None:
    """Give all processes the same running statistics: the mean of those that had states since the last call, each with as much weight as
    it had states. Every process must call it after every optimizer step; a checkpoint is then that of all, and a resumed run the same."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    norms = [m for head in heads_of(model).values() for m in head.modules() if isinstance(m, RunningNorm)]
    if not norms:
        return
    sums = [torch.cat([norm.mean, norm.variance + norm.mean.square(), norm.mean.new_ones(1)]) for norm in norms]
    flat = torch.cat([one * norm.counted for one, norm in zip(sums, norms)])
    dist.all_reduce(flat)
    seen = torch.stack([norm.batches for norm in norms])
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    for norm, one, batches in zip(norms, flat.split([len(one) for one in sums]), seen):
        mean, squares, number = one.split([len(norm.mean), len(norm.mean), 1])
        if number > 0:
            norm.mean.copy_(mean / number)
            norm.variance.copy_((squares / number - norm.mean.square()).clamp(min=0))
            norm.batches.copy_(batches)
        norm.counted = 0
