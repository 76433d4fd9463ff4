"""How far is a predicted mask from its target?

LISA's losses (arXiv 2308.00692) are cross-entropy and Dice, a mask at a time; SAM-UNet's (Hhankyangg/sam-unet) focal and Dice over the
whole batch and, where the decoder says how well it does, how wrong it is about that.
"""

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


FOCAL_WEIGHT, FOCAL_ALPHA, FOCAL_GAMMA = 20.0, 0.25, 2.0
"""SAM-UNet's published weight beside Dice's 1, and its focal loss's settings."""


def batch_focal(logits: Tensor, targets: Tensor) -> Tensor:
    """logits, targets ``(N, H, W)`` → fp32 scalar: the mean over all pixels that count, foreground weighted with alpha."""
    logits, wanted, counts = _read(logits, targets)
    p = logits.sigmoid()
    found = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * wanted * (p + 1e-12).log()
    left = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * (1 - wanted) * (1 - p + 1e-12).log()
    return -((found + left) * counts).sum() / counts.sum().clamp(min=1)


def batch_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """logits, targets ``(N, H, W)`` → fp32 scalar: one Dice for all masks together, 1 added above and below."""
    logits, wanted, counts = _read(logits, targets)
    claimed = logits.sigmoid() * counts
    return 1 - (2 * (claimed * wanted).sum() + 1) / (claimed.sum() + wanted.sum() + 1)


def iou_error(logits: Tensor, targets: Tensor, scores: Tensor) -> Tensor:
    """scores ``(N,)``: what the decoder takes its IoU for → fp32 scalar: their mean square distance from the batch's soft IoU."""
    logits, wanted, counts = _read(logits, targets)
    claimed = logits.sigmoid() * counts
    both = (claimed * wanted).sum()
    iou = both / (claimed.sum() + wanted.sum() - both + 1e-7)
    return (iou - scores.float()).square().mean()


def _read(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = targets.flatten(1)
    counts = (targets != IGNORE_PIXEL).to(torch.float32)
    return logits.float().flatten(1), (targets == 1).to(torch.float32), counts
