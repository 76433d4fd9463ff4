"""How far is a predicted mask from its target? LISA's losses (arXiv 2308.00692): cross-entropy and Dice, a mask at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.processing.mask_files import IGNORE_PIXEL

BCE_WEIGHT, DICE_WEIGHT = 2.0, 0.5
"""LISA's published weights; words weigh 1."""
DICE_SCALE, DICE_EPS = 1000.0, 1e-6


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """logits, targets ``(N, H, W)`` (1, 0, 255: does not count) → ``(N,)`` fp32, the mean over a mask's own pixels."""
    logits, wanted, counts = _read(logits, targets)
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (losses * counts).sum(1) / counts.sum(1).clamp(min=1)


def mask_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """logits, targets ``(N, H, W)`` → ``(N,)`` fp32. Sums are divided by 1000 before 1e-6 is added, which is part of the published
    loss: an empty target costs about 1 wherever a thousandth of a pixel is claimed."""
    logits, wanted, counts = _read(logits, targets)
    claimed = logits.sigmoid() * counts
    both = 2 * (claimed / DICE_SCALE * wanted).sum(1)
    all_ = (claimed / DICE_SCALE).sum(1) + (wanted * counts / DICE_SCALE).sum(1)
    return 1 - (both + DICE_EPS) / (all_ + DICE_EPS)


def _read(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = targets.flatten(1)
    counts = (targets != IGNORE_PIXEL).to(torch.float32)
    return logits.float().flatten(1), (targets == 1).to(torch.float32), counts
