"""What do MapAnything's heads tell of views? Along which ray each pixel looks and how far, how sure that is, where the camera stands, and
how long a unit of all this is in metres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mllm.encoders.dpt import Fusion
from mllm.encoders.pi3_heads import CameraHead
from mllm.types import Grid

_VALUES, _HIDDEN, _LINEAR = 6, 196, 2
"""Of a pixel: ray, depth, confidence, mask. Channels and hidden layers of the scale's head."""


class Maps(nn.Module):
    """DPT (arXiv 2103.13413) from the patches of four layers to one map of 8 cells along a patch's side.

    Args:
        widths: channels of the four layers.
        channels: of their maps, of 4, 2, 1 and 1/2 cells along a patch's side.
        fused: channels of what they are fused into.
    """

    def __init__(self, widths: Sequence[int], channels: Sequence[int], fused: int):
        super().__init__()
        resized: list[list[nn.Module]] = [
            [nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4)],
            [nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2)],
            [],
            [nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1)],
        ]
        self.input_process = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(nn.Conv2d(width, count, 1), *more), nn.Conv2d(count, fused, 3, padding=1, bias=False)
            )
            for width, count, more in zip(widths, channels, resized, strict=True)
        )
        self.scratch = nn.Module()
        for number in range(1, 5):
            setattr(self.scratch, f"refinenet{number}", Fusion(fused, first=number == 4, clipped=False))

    def forward(self, layers: Sequence[Tensor], grid: Grid) -> Tensor:
        """Patches ``(B, N, D)`` of four layers on a grid → ``(B, fused, 8 rows, 8 columns)``."""
        maps = [
            self.input_process[number](tokens.transpose(1, 2).unflatten(2, grid))
            for number, tokens in enumerate(layers)
        ]
        x = self._twice(4, maps[3], None)[:, :, : grid[0], : grid[1]]  # half a row too many where the grid's are odd
        for number in (3, 2, 1):
            x = self._twice(number, x, maps[number - 1])
        return x

    def _twice(self, number: int, x: Tensor, finer: Tensor | None) -> Tensor:
        step: Any = getattr(self.scratch, f"refinenet{number}")
        return step(x, finer, [2 * length for length in x.shape[2:]])


class Pixels(nn.Module):
    """A map → values of every pixel."""

    def __init__(self, fused: int):
        super().__init__()
        half = fused // 2
        self.conv1 = nn.Conv2d(fused, half, 3, padding=1)
        self.conv2 = nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, _VALUES, 1))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``(B, fused, h, w)`` → ``(B, *size, 6)``."""
        x = F.interpolate(self.conv1(x), size=size, mode="bilinear", align_corners=True)
        return self.conv2(x).permute(0, 2, 3, 1)


class QuaternionHead(CameraHead):
    """Patches ``(B, N, D)`` → where the cameras stand ``(B, 3)`` and how they are turned: quaternions ``(B, 4)`` (x, y, z, w, of any
    length; camera → world)."""

    def __init__(self, width_in: int, width: int):
        super().__init__(width, turned=4)
        self.proj = nn.Linear(width_in, width)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(self.proj(patches))


class ScaleHead(nn.Module):
    """Scale tokens ``(B, D)`` → metres of a unit ``(B,)``."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, _HIDDEN)
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()) for _ in range(_LINEAR))
        self.output_proj = nn.Linear(_HIDDEN, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.proj(tokens)
        for layer in self.mlp:
            x = layer(x)
        return self.output_proj(x)[:, 0].exp().clamp(min=1e-8)


class MapAnythingHeads(nn.Module):
    """All that MapAnything tells of a view.

    Args:
        widths: channels of the four layers that it reads, the last of which tells camera and scale.
        patch_size: pixels of a patch's side.
        channels, fused: see `Maps`.
    """

    def __init__(self, widths: Sequence[int], patch_size: int, *, channels: Sequence[int], fused: int):
        super().__init__()
        self.patch_size = patch_size
        self.dense_head = nn.Sequential(Maps(widths, channels, fused), Pixels(fused))
        self.pose_head = QuaternionHead(widths[-1], 4 * patch_size**2)
        self.scale_head = ScaleHead(widths[-1])

    def forward(self, layers: Sequence[Tensor], scale: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        """Patches ``(B, N, D)`` of four layers on a grid and scale tokens ``(B, D)`` → rays of length 1 before the camera ``(B, H, W, 3)``,
        depth along them ``(B, H, W)``, confidence ``(B, H, W)`` from 1 on, the mask of what lies somewhere ``(B, H, W)`` before its
        sigmoid, the cameras' places ``(B, 3)`` and quaternions ``(B, 4)``, and the metres ``(B,)`` of a unit of depth and places."""
        maps, pixels = self.dense_head
        told = pixels(maps(layers, grid), (grid[0] * self.patch_size, grid[1] * self.patch_size))
        rays = told[..., :3] / told[..., :3].norm(dim=-1, keepdim=True).clamp(min=1e-8)
        depth, confidence, mask = told[..., 3].exp(), 1 + told[..., 4].exp(), told[..., 5]
        return rays, depth, confidence, mask, *self.pose_head(layers[-1]), self.scale_head(scale)
