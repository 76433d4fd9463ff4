"""Which frames show most of a scene? Spatial-MLLM's choice by voxels (arXiv 2505.23747), from a geometry encoder's points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.errors import DataError

VOXELS = 20
"""Voxels along the shortest side of the scene."""


def space_aware_frames(points: Tensor, confidence: Tensor, count: int) -> list[int]:
    """Up to ``count`` of F frames, ascending, that together cover most voxels; fewer where the rest would add none. Give them to
    `mllm.types.Video` as ``frames``, mapped to the video's own numbers.

    points ``(F, H, W, 3)`` in the scene's coordinates, confidence ``(F, H, W)``; points below the median confidence do not count,
    nor do those that are no numbers. Raises `DataError` when none is left.
    """
    finite = points.isfinite().all(dim=-1) & confidence.isfinite()
    if not finite.any():
        raise DataError("space-aware frames: no point is a finite number; the depth or its confidence is broken")
    counted = finite & (confidence >= torch.quantile(confidence[finite].double(), 0.5))
    corner, far = points[counted].amin(dim=0), points[counted].amax(dim=0)
    edge = float((far - corner).min()) / VOXELS
    if edge <= 0:
        raise DataError("space-aware frames: the scene is flat, so it has no voxels")
    return sorted(greedy_cover(voxel_sets(points, counted, corner, edge), count))


def voxel_sets(points: Tensor, counted: Tensor, corner: Tensor, edge: float) -> list[set[tuple[int, ...]]]:
    """For each frame, the voxels (i, j, k) that its points ``(F, H, W, 3)`` lie in. counted ``(F, H, W)`` bool."""
    cells = torch.floor((points - corner) / edge)
    return [
        {tuple(cell) for cell in torch.unique(frame[mask], dim=0).long().tolist()}
        for frame, mask in zip(cells, counted.bool(), strict=True)
    ]


def greedy_cover(sets: Sequence[set], count: int) -> list[int]:
    """Numbers of up to ``count`` sets in the order chosen: each time the one that adds most, of equals the first; none where
    nothing is added."""
    chosen: list[int] = []
    covered: set = set()
    for _ in range(min(count, len(sets))):
        gains = [-1 if k in chosen else len(found - covered) for k, found in enumerate(sets)]
        best = max(range(len(sets)), key=lambda k: gains[k])
        if gains[best] <= 0:
            break
        chosen.append(best)
        covered |= sets[best]
    return chosen
