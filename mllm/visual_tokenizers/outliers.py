"""Which pixels of a picture are not to be learned from, and how does a loss leave them out (Asymmetric Dual 3DGS, arXiv 2506.03538)?

Written from a description of steveli88/AsymGS (Apache-2.0) and checked by its numbers. The masks act on gradients alone: a loss has the
value it would have without them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.visual_tokenizers.evaluate import ssim

SLOPE = 8.0
"""How fast a learned mask falls from 1 to 0 with its logit."""


def region_mask(pixels: Tensor, features: Tensor, regions: Tensor, *, quantile: float = 0.9) -> Tensor:
    """What is kept ``(B, 1, H, W)`` bool: all but the regions in which more pixels than in the whole picture are hot, that is above the
    picture's own quantile in both residuals.

    Args:
        pixels, features: residuals ``(B, 1, H, W)``: mean absolute difference of the colours, and one less the cosine of features.
        regions: proposals ``(B, R, H, W)`` or ``(R, H, W)`` for all, 0 or 1.
    """
    hot = torch.ones_like(pixels, dtype=torch.bool)
    for residual in (pixels, features):
        level = residual.flatten(1).float().quantile(quantile, 1)
        hot &= residual > level.view(-1, 1, 1, 1).to(residual)
    inside = (regions > 0).expand(len(pixels), *regions.shape[-3:])
    density = (hot & inside).flatten(2).sum(2) / inside.flatten(2).sum(2).clamp_min(1)
    dropped = density > hot.flatten(1).float().mean(1, keepdim=True)
    return ~(inside & dropped[..., None, None]).any(1, keepdim=True)


def grid_regions(height: int, width: int, side: int, device: torch.device | None = None) -> Tensor:
    """Squares of ``side`` pixels ``(R, H, W)`` as proposals, where no segmenter gives any."""
    down, across = -(-height // side), -(-width // side)
    rows = torch.arange(height, device=device) // side
    columns = torch.arange(width, device=device) // side
    numbers = rows[:, None] * across + columns
    return (numbers == torch.arange(down * across, device=device)[:, None, None]).float()


def soft_target(features: Tensor) -> Tensor:
    """What a learned mask is fitted to: 1 less the features' residual ``(B, 1, H, W)``, each picture's between 0 and 1; detached."""
    flat = features.detach().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    share = (flat - low[:, None]) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
    return (1 - share).view_as(features)


def soft_mask(logits: Tensor, *, slope: float = SLOPE) -> Tensor:
    """A learned mask of 0 to 1, from one logit a pixel."""
    return (slope * logits).sigmoid()


def soft_mask_loss(mask: Tensor, features: Tensor) -> Tensor:
    """How far a learned mask is from its target."""
    return F.l1_loss(mask, soft_target(features))


def gradient_masked(made: Tensor, keep: Tensor) -> Tensor:
    """``made`` ``(B, C, H, W)``, whose gradients are scaled by ``keep`` ``(B, 1, H, W)`` (0 to 1, or bool); its values stay."""
    share = keep.to(made.dtype)
    return share * made + (1 - share) * made.detach()


def render_loss(made: Tensor, target: Tensor, keep: Tensor, *, dissimilarity: float = 0.2) -> Tensor:
    """``(1 - λ) L1 + λ (1 - SSIM)`` of pictures in [0, 1], a batch's mean, with gradients only where ``keep`` lets them."""
    made = gradient_masked(made, keep)
    alike = ssim(made, target, padded=True).mean().to(made.dtype)
    return (1 - dissimilarity) * F.l1_loss(made, target) + dissimilarity * (1 - alike)
