"""Which losses keep a gate from collapsing onto one expert, or from never deciding?

Shapes: logits, probabilities, weights, allowed ``(B, E)``. Means run over the images of the micro-batch that have at
least one allowed expert; without any, every loss is 0 with zero gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["load_balance", "z_loss", "batch_entropy", "instance_entropy"]


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Mean over the first dimension of the rows that count."""
    mask = rows.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (values * mask).sum(dim=0) / mask.sum().clamp_min(1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats; 0 log 0 is 0."""
    used = probabilities > 0
    return -torch.where(used, probabilities * torch.where(used, probabilities, 1.0).log(), 0.0).sum(dim=-1)


def load_balance(logits: Tensor, probabilities: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """Switch Transformer's ``E * sum_e f_e P_e`` (arXiv 2101.03961): f_e the share of the chosen slots, P_e the mean
    probability. 1 at balance, up to E at collapse. Forced balance can hurt where the data's own use of experts is
    long-tailed (arXiv 2507.01351)."""
    rows = allowed.any(dim=-1)
    chosen = (weights > 0).to(probabilities.dtype)
    shares = _mean(chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(1), rows).detach()
    return probabilities.shape[-1] * (shares * _mean(probabilities, rows)).sum()


def z_loss(logits: Tensor, probabilities: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """ST-MoE's mean squared log-sum-exp of the logits (arXiv 2202.08906): keeps them small."""
    floor = torch.finfo(logits.dtype).min
    return _mean(logits.masked_fill(~allowed, floor).logsumexp(dim=-1).clamp_min(-1e4).square(), allowed.any(dim=-1))


def batch_entropy(logits: Tensor, probabilities: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """SCOPE's dataset-level term (arXiv 2510.12974): ``log E`` minus the entropy of the mean distribution over the
    batch; 0 when the batch uses all experts alike. Needs batches larger than E to mean anything."""
    rows = allowed.any(dim=-1)
    lack = torch.log(logits.new_tensor(float(logits.shape[-1]))) - entropy(_mean(probabilities, rows))
    return lack * rows.any()


def instance_entropy(logits: Tensor, probabilities: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """SCOPE's instance-level term (arXiv 2510.12974): mean entropy of each image's distribution; 0 when each is
    certain."""
    return _mean(entropy(probabilities), allowed.any(dim=-1))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "load_balance": load_balance,
    "z_loss": z_loss,
    "batch_entropy": batch_entropy,
    "instance_entropy": instance_entropy,
}
