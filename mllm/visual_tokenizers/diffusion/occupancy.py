"""What stands along the rays of a camera in a grid of labelled voxels (DualDiff+, arXiv 2503.03689)?

Written from a description of yangzhaojason/DualDiff, which states no licence, and checked by its numbers. No depth and no occlusion: what
stands behind the first thing on a ray is told too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm.errors import ConfigError
from mllm.types import Grid


@dataclass(frozen=True)
class VoxelGrid:
    """Where a grid of voxels lies in the vehicle's frame (x ahead, y left, z up), in metres; the defaults are Occ3D-nuScenes'."""

    origin: tuple[float, float, float] = (-40.0, -40.0, -1.0)
    side: float = 0.4
    free: int = 17
    """Label of a voxel with nothing in it, and of all outside."""
    foreground: int = 10
    """The last label of things; those up to ``free`` are background."""


def occupancy_rays(
    voxels: Tensor,
    rotation: Tensor,
    translation: Tensor,
    intrinsic: Tensor,
    *,
    size: Grid,
    ratio: float | Sequence[float],
    points: int = 320,
    step: float = 0.2,
    grid: VoxelGrid | None = None,
) -> Tensor:
    """Labels ``(V, h, w, points)`` along the ray of each pixel of V cameras' latents.

    Args:
        voxels: labels ``(X, Y, Z)``.
        rotation: camera to vehicle, quaternions ``(V, 4)`` as w, x, y, z, or matrices ``(V, 3, 3)``.
        translation: the cameras' places ``(V, 3)``.
        intrinsic: ``(V, 3, 3)`` at the picture's size.
        size: rows and columns of the latents.
        ratio: latent side over picture side, one or (rows, columns); pixel ``floor(x / ratio)`` is looked at, as published.
        points: on a ray, the first at the camera. step: metres between them.

    Raises:
        ConfigError: for shapes that do not fit.
    """
    grid = grid or VoxelGrid()
    if voxels.dim() != 3:
        raise ConfigError(f"voxels: {tuple(voxels.shape)}; labels (X, Y, Z) are expected")
    turn = _matrix(rotation.double())
    if turn.shape != intrinsic.shape or translation.shape != turn.shape[:2]:
        raise ConfigError(
            f"rotation {tuple(rotation.shape)}, translation {tuple(translation.shape)} and intrinsic {tuple(intrinsic.shape)} "
            "are of as many cameras: (V, 4), (V, 3) and (V, 3, 3)"
        )
    by_rows, by_columns = (ratio, ratio) if isinstance(ratio, int | float) else ratio
    rows, columns = (
        (torch.arange(n, dtype=torch.float64, device=voxels.device) / by).floor()
        for n, by in zip(size, (by_rows, by_columns))
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1)
    ahead = torch.einsum("vij,hwj->vhwi", turn @ torch.linalg.inv(intrinsic.double()), pixels)
    ahead = ahead / ahead.norm(dim=-1, keepdim=True)
    far = step * torch.arange(points, dtype=torch.float64, device=voxels.device)
    places = translation.double()[:, None, None, None] + ahead[..., None, :] * far[:, None]
    cells = ((places - places.new_tensor(grid.origin)) / grid.side).floor().long()
    bounds = torch.tensor(voxels.shape, device=voxels.device)
    inside = ((cells >= 0) & (cells < bounds)).all(-1)
    i, j, k = cells.clamp_min(0).minimum(bounds - 1).unbind(-1)
    return torch.where(inside, voxels[i, j, k], grid.free)


def occupancy_map(
    labels: Tensor, kind: Literal["all", "foreground", "background"], grid: VoxelGrid | None = None
) -> Tensor:
    """Labels ``(V, h, w, points)`` → a condition ``(V, points, h, w)`` in [0, 1], as published: the points of a ray are the channels, and
    the class's number is taken for a quantity. kind: which labels stay; the others become free."""
    grid = grid or VoxelGrid()
    return kept_labels(labels, kind, grid).movedim(-1, 1).float() / grid.free


def kept_labels(
    labels: Tensor, kind: Literal["all", "foreground", "background"], grid: VoxelGrid | None = None
) -> Tensor:
    """Labels with those of another kind as free."""
    grid = grid or VoxelGrid()
    if kind == "all":
        return labels
    things = labels <= grid.foreground
    return torch.where(things if kind == "foreground" else ~things, labels, grid.free)


def _matrix(rotation: Tensor) -> Tensor:
    """Quaternions ``(V, 4)`` w, x, y, z → matrices; matrices stay."""
    if rotation.dim() == 3:
        return rotation
    w, x, y, z = (rotation / rotation.norm(dim=-1, keepdim=True)).unbind(-1)
    flat = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(flat, -1).unflatten(-1, (3, 3))
