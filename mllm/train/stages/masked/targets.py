"""Which cells of a picture are hidden in two views, what is to be told of each cell, and what does a wrong answer cost?

DMJD (arXiv 2301.00230): the second view hides mostly what the first one showed, and visible cells are told too. Uni4Eye's targets
(pixels and the size of their gradient) stand beside DMJD's histograms of gradients.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.types import Grid

Target = Literal["hog", "pixels", "gradients", "pixels_gradients", "teacher"]
LossPair = Literal["l2_smooth", "smooth_l2"]
BINS = 9
_BETA = 2.0


def disjoint_masks(
    batch: int, grid: Grid, mask_ratio: float, predict_ratio: float, block: int = 1
) -> tuple[Tensor, Tensor]:
    """Two masks ``(B, rows · columns)``, true where hidden, of the same number of cells for every picture.

    The second one hides ``min(predict_ratio - mask_ratio, mask_ratio)`` of all cells from what the first one shows, the rest from what
    it hid, so that together they hide ``predict_ratio``. block: rows and columns that are hidden together.
    """
    rows, columns = grid[0] // block, grid[1] // block
    count = rows * columns
    hidden = min(max(round(mask_ratio * count), 1), count - 1)
    fresh = min(round(min(predict_ratio - mask_ratio, mask_ratio) * count), count - hidden, hidden)
    order = torch.rand(batch, count).argsort(1)
    first = order[:, :hidden]
    second = torch.cat([order[:, hidden : hidden + fresh], order[:, : hidden - fresh]], dim=1)
    masks = []
    for chosen in (first, second):
        mask = torch.zeros(batch, count, dtype=torch.bool).scatter(1, chosen, True).view(batch, rows, columns)
        masks.append(mask.repeat_interleave(block, 1).repeat_interleave(block, 2).flatten(1))
    return masks[0], masks[1]


def hide(pixels: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """Normalised pixels ``(B, 3, H, W)`` whose hidden cells have the mean colour, 0."""
    shown = (~mask).view(-1, 1, *grid).to(pixels.dtype)
    return pixels * F.interpolate(shown, size=pixels.shape[2:], mode="nearest")


def cells(pixels: Tensor, grid: Grid) -> Tensor:
    """``(B, C, H, W)`` → ``(B, rows · columns, C · height · width)`` of a cell; both sides are multiples of the grid's."""
    height, width = pixels.shape[2] // grid[0], pixels.shape[3] // grid[1]
    x = pixels.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def gradients(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and down of every channel, edges repeated: two of ``(B, C, H, W)``."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    return padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2], padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]


def target_of(pixels: Tensor, grid: Grid, kind: Target) -> Tensor:
    """What is to be told of every cell: ``(B, N, D)`` float32, without gradient.

    hog: histograms of 9 unsigned directions of each channel, weighted by the gradient's size and of length 1. pixels: of the cell,
    with mean 0 and variance 1. gradients: sizes of the gradient, averaged over channels. pixels_gradients: both.
    """
    pixels = pixels.float()
    if kind == "hog":
        across, down = gradients(pixels)
        size = (across**2 + down**2).sqrt()
        bins = (torch.atan2(down, across) % math.pi / math.pi * BINS).long().clamp_max(BINS - 1)
        parts = [cells(size * (bins == b), grid).unflatten(2, (pixels.shape[1], -1)).sum(3) for b in range(BINS)]
        return F.normalize(torch.stack(parts, dim=-1), dim=-1).flatten(2)
    x = cells(pixels, grid)
    normalised = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()
    if kind == "pixels":
        return normalised
    across, down = gradients(pixels)
    size = cells((across**2 + down**2).sqrt().mean(1, keepdim=True), grid)
    return size if kind == "gradients" else torch.cat([normalised, size], dim=2)


def joint_loss(
    hidden: Tensor, visible: Tensor, target: Tensor, mask: Tensor, *, pair: LossPair = "l2_smooth", weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """DMJD's two losses: of the hidden cells' predictions, and ``weight`` times that of the visible ones'.

    hidden ``(V·B, N, D)``: predictions of all cells, of which the hidden ones count; visible ``(V·B, M, D)``: of the visible cells in
    raster order (the authors compare their shuffled order with the raster order; here both are the same cells); target ``(B, N, D)``;
    mask ``(V·B, N)``: true where hidden, with as many in every row. pair: which of squares and smooth L1 each has.
    """
    views = len(mask) // len(target)
    target, mask = target.repeat(views, 1, 1), mask.bool()
    shown = target[~mask].view(len(mask), -1, target.shape[2])
    squares = [(hidden - target) ** 2, (visible - shown) ** 2]
    smooth = [F.smooth_l1_loss(a, b, beta=_BETA, reduction="none") for a, b in ((hidden, target), (visible, shown))]
    first, second = (squares[0], smooth[1]) if pair == "l2_smooth" else (smooth[0], squares[1])
    of_hidden = (first.mean(2) * mask).sum() / mask.sum()
    return of_hidden, weight * second.mean()
