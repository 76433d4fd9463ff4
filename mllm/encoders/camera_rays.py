"""Where does a camera stand, and what lens has it, whose pixels' rays are known roughly? As from Depth Anything 3's ray map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TRIES, _DRAWN, _SUREST, _NEAR, _FLAT = 100, 8, 0.3, 0.2, 1e-4
"""Guesses, rays that each is made from, the share of surest rays that these are of, how far (at distance 1 along the first view's axis) a
ray may lie from where a guess sees it, and how steep a ray must be to that axis's plane to count: as published."""


@dataclass
class Cameras:
    """Cameras of S views.

    turns: ``(S, 3, 3)``, camera → world.
    places: ``(S, 3)``.
    lens: ``(S, 3, 3)``, upper triangular, its last entry 1: a pixel at ``(x, y)``, from -1 (left, top edge) to 1, is seen along
        ``lens @ (x, y, 1)`` by the camera (x right, y down, z forward).
    """

    turns: Tensor
    places: Tensor
    lens: Tensor


def pixel_places(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """``(x, y, 1)`` of the centres of a map's cells, as `Cameras` counts them: ``(rows, columns, 3)``."""
    down, across = ((torch.arange(count, device=device) + 0.5) / count * 2 - 1 for count in (rows, columns))
    y, x = torch.meshgrid(down, across, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def cameras_of_rays(rays: Tensor, confidence: Tensor, *, seed: int = 0) -> Cameras:
    """The cameras that have such rays, by Depth Anything 3's way (arXiv 2511.10647): the homography from pixels to directions, fitted to
    guesses' largest agreement, and the mean of the places that the rays tell.

    The homography is taken apart as rotation times upper triangular lens, which is exact for any lens; the authors' code takes a lower
    triangular one, which is the same where the axis goes through the picture's middle.

    Args:
        rays: ``(S, h, w, 6)``: directions in the world, of any length, and the camera's place.
        confidence: ``(S, h, w)``, above 0.
        seed: of the guesses.

    Returns:
        `Cameras` in float64.
    """
    views, rows, columns = confidence.shape
    told = rays.double().flatten(1, 2)
    weight = confidence.double().flatten(1) * (told[..., 2].abs() > _FLAT)
    pixels = pixel_places(rows, columns, rays.device).double().flatten(0, 1)
    seen = told[..., :2] / torch.where(told[..., 2:3].abs() > _FLAT, told[..., 2:3], 1.0)
    order = weight.argsort(dim=1, descending=True)
    generator = torch.Generator().manual_seed(seed)
    among = max(_DRAWN, int(rows * columns * _SUREST))
    draws = torch.stack([torch.randperm(among, generator=generator)[:_DRAWN] for _ in range(_TRIES)])
    turns, lenses = [], []
    for view in range(views):  # one after another: guesses × rays of one are held
        chosen = order[view][draws.to(rays.device)]
        guesses = homography(pixels[chosen], seen[view][chosen], weight[view][chosen])
        agreed = _near(guesses, pixels, seen[view])
        best = agreed[(agreed * weight[view]).sum(dim=1).argmax()]
        turn, lens = taken_apart(homography(pixels, seen[view], weight[view] * best))
        turns.append(turn)
        lenses.append(lens)
    places = (told[..., 3:] * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True)
    return Cameras(torch.stack(turns), places, torch.stack(lenses))


def _near(guesses: Tensor, pixels: Tensor, seen: Tensor) -> Tensor:
    """Which rays ``(N, 2)`` lie where guesses ``(K, 3, 3)`` see their pixels ``(N, 3)``: ``(K, N)``."""
    found = pixels @ guesses.mT
    return (found[..., :2] / found[..., 2:] - seen).norm(dim=-1) < _NEAR


def homography(pixels: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """The matrix ``(…, 3, 3)`` of length 1 that takes pixels ``(…, N, 3)`` nearest to points ``(…, N, 2)`` of the plane at distance 1, by
    weighted least squares of what is linear in it (DLT)."""
    nothing = torch.zeros_like(pixels)
    x, y = (seen[..., axis, None] * pixels for axis in (0, 1))
    equations = torch.cat([torch.cat([-pixels, nothing, x], dim=-1), torch.cat([nothing, -pixels, y], dim=-1)], dim=-2)
    weighted = equations * torch.cat([weight, weight], dim=-1)[..., None]
    return torch.linalg.eigh(equations.mT @ weighted)[1][..., 0].unflatten(-1, (3, 3))


def taken_apart(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A homography ``(3, 3)`` up to its sign and length → rotation and lens (`Cameras`)."""
    turn, lens = torch.linalg.qr(matrix if torch.linalg.det(matrix) > 0 else -matrix)
    signs = torch.where(lens.diagonal() < 0, -1.0, 1.0)
    lens = lens * signs[:, None]
    return turn * signs, lens / lens[2, 2]
