"""How do the features of patches become a value for every pixel? DPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.types import Grid

_LAST, _BASE = 32, 100.0
_RAYS, _FINEST = 7, "3"


class ResidualConvs(nn.Module):
    """Two convolutions beside what they are given; clipped: all that is negative is taken away from that first, as where the activation
    works in place."""

    def __init__(self, width: int, *, clipped: bool):
        super().__init__()
        self.clipped = clipped
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        positive = F.relu(x)
        return (positive if self.clipped else x) + self.conv2(F.relu(self.conv1(positive)))


class Fusion(nn.Module):
    """One step of DPT (arXiv 2103.13413) from a coarse map to the next finer one."""

    def __init__(self, width: int, *, first: bool, clipped: bool):
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        if not first:
            self.resConfUnit1 = ResidualConvs(width, clipped=clipped)
        self.resConfUnit2 = ResidualConvs(width, clipped=clipped)

    def forward(self, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DptHead(nn.Module):
    """DPT (arXiv 2103.13413) on the patches of four layers, as the heads of VGGT and Depth Anything 3 have it.

    Args:
        width: channels of the features that it reads.
        patch_size: pixels of a patch's side.
        channels: of the four maps.
        fused: channels of what they are fused into.
        outputs: values of a pixel.
        clipped: see `ResidualConvs` (VGGT's head).
    """

    def __init__(
        self, width: int, *, patch_size: int, channels: Sequence[int], fused: int, outputs: int, clipped: bool
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, count, 1) for count in channels)
        a, b, _, d = channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(a, a, 4, stride=4),
                nn.ConvTranspose2d(b, b, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(d, d, 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for number, count in enumerate(channels, start=1):
            setattr(self.scratch, f"layer{number}_rn", nn.Conv2d(count, fused, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{number}", Fusion(fused, first=number == len(channels), clipped=clipped))
        self.scratch.output_conv1 = nn.Conv2d(fused, fused // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(fused // 2, _LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(_LAST, outputs, 1)
        )

    def forward(self, layers: Sequence[Tensor], grid: Grid) -> Tensor:
        """Patches ``(B, N, D)`` of four layers on a grid → ``(B, H, W, outputs)``, a value for each pixel."""
        return self._every_pixel(self._maps(layers, grid), self._size(grid))

    def _size(self, grid: Grid) -> tuple[int, int]:
        return (grid[0] * self.patch_size, grid[1] * self.patch_size)

    def _maps(self, layers: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """A map of each layer, from fine to coarse: 4, 2, 1 and 1/2 cells along a patch's side."""
        maps: list[Tensor] = []
        for number, tokens in enumerate(layers):
            x = self.projects[number](self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            x = self.resize_layers[number](x + place_waves(x, self._size(grid)))
            maps.append(self._scratch(f"layer{number + 1}_rn")(x))
        return maps

    def _fused(self, maps: Sequence[Tensor], branch: str = "") -> Tensor:
        """One map of 8 cells along a patch's side, by the steps of a branch."""
        x, finer = maps[3], None
        sizes = [[2 * length for length in maps[0].shape[2:]], *(one.shape[2:] for one in maps[:3])]
        for number in (4, 3, 2, 1):
            x = self._scratch(f"refinenet{number}{branch}")(x, finer, sizes[number - 1])
            finer = maps[number - 2]
        return x

    def _every_pixel(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        x = self._scratch("output_conv1")(self._fused(maps))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return self._scratch("output_conv2")(x + place_waves(x, size)).permute(0, 2, 3, 1)

    def _scratch(self, name: str) -> Any:
        return getattr(self.scratch, name)


class DualDptHead(DptHead):
    """Depth Anything 3's head of two branches (arXiv 2511.10647): one tells depth, the other, with steps of its own from the same maps, the
    rays. Of the latter's four outputs the finest is built, which alone is read."""

    def __init__(self, width: int, *, patch_size: int, channels: Sequence[int], fused: int) -> None:
        super().__init__(width, patch_size=patch_size, channels=channels, fused=fused, outputs=2, clipped=False)
        for number in range(1, 5):
            setattr(self.scratch, f"refinenet{number}_aux", Fusion(fused, first=number == 4, clipped=False))
        turns = [(fused, fused // 2), (fused // 2, fused)] * 3
        neck = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in turns[:5]))
        told = {
            "0": nn.Conv2d(fused // 2, _LAST, 3, padding=1),
            "2": nn.LayerNorm(_LAST),
            "5": nn.Conv2d(_LAST, _RAYS, 1),
        }
        self.scratch.output_conv1_aux = nn.ModuleDict({_FINEST: neck})
        self.scratch.output_conv2_aux = nn.ModuleDict({_FINEST: nn.ModuleDict(told)})

    def both(self, layers: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        """Patches ``(B, N, D)`` of four layers on a grid → depth and its confidence before their activations ``(B, H, W, 2)``, and rays
        ``(B, 8 rows, 8 columns, 7)``: a direction, the camera's place, and a confidence before its activation."""
        maps = self._maps(layers, grid)
        x = self._scratch("output_conv1_aux")[_FINEST](self._fused(maps, "_aux"))
        told = self._scratch("output_conv2_aux")[_FINEST]
        x = told["0"](x + place_waves(x, self._size(grid)))
        x = F.relu(told["2"](x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self._every_pixel(maps, self._size(grid)), told["5"](x).permute(0, 2, 3, 1)


def place_waves(x: Tensor, size: tuple[int, int], share: float = 0.1) -> Tensor:
    """Sines and cosines of the places of a map's cells, a first half of the channels for columns: ``(1, C, h, w)``. Places lie between the
    corners of a rectangle of the picture's shape whose half diagonal is 1. size: of the picture."""
    channels, rows, cols = x.shape[1:]
    diagonal = (size[0] ** 2 + size[1] ** 2) ** 0.5
    spans = [length / diagonal * (cells - 1) / cells for length, cells in ((size[1], cols), (size[0], rows))]
    across, down = (
        torch.linspace(-span, span, cells, dtype=torch.float64, device=x.device)
        for span, cells in zip(spans, (cols, rows), strict=True)
    )
    quarter = channels // 4
    frequency = _BASE ** (-torch.arange(quarter, dtype=torch.float64, device=x.device) / quarter)
    waves = []
    for places in (across[None, :].expand(rows, cols), down[:, None].expand(rows, cols)):
        angles = places[..., None] * frequency
        waves += [angles.sin(), angles.cos()]
    return (share * torch.cat(waves, dim=-1)).permute(2, 0, 1)[None].to(x.dtype)
