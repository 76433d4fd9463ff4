"""How do the shallow and the deep maps of a convolutional encoder fill a hole together (MEDFE, arXiv 2007.06929)?

Shallow maps tell texture, deep ones structure; both are filled by partial convolutions, made equal over neighbourhoods, and given back to
every map. Written from a description of KumapowerLIU/Rethinking-Inpainting-MEDFE, which states no licence, and checked by its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError

SLOPE = 0.2
"""Of all its leaky rectifiers."""
LEVELS = 6
"""Maps that it reads and gives back; the third has the side at which both branches meet."""


def level_widths(width: int) -> tuple[int, ...]:
    """Channels of the maps, the shallowest first."""
    return (width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width)


@dataclass(frozen=True)
class Equalized:
    """maps: the six given, each with its share of the equalised map added. structure, texture: the filled branches ``(B, 4u, S, S)``.
    equalized: what was added ``(B, 8u, S, S)``. holes: ``(B, 1, S, S)``, true where something is filled."""

    maps: list[Tensor]
    structure: Tensor
    texture: Tensor
    equalized: Tensor
    holes: Tensor


class FeatureEqualization(nn.Module):
    """Texture and structure branches over six maps, with the holes of a mask filled.

    Args:
        width: channels u of the first map (`level_widths`); published: 64.
        threshold: share of a cell's pixels (three averaging convolutions) above which it is a hole. The published code says 1, which is
            never exceeded, so its convolutions see no hole.
        scramble: read the equalised positions and channels in the published code's order, which mixes them up.
        sigma: of the Gaussian over positions, in cells.
    """

    def __init__(self, width: int = 64, *, threshold: float = 0.5, scramble: bool = False, sigma: float = 1.5):
        super().__init__()
        u = width
        self.width, self.threshold = width, threshold
        self.texture_1 = _Convs(u, 2 * u, 4 * u)
        self.texture_2 = _Convs(2 * u, 4 * u)
        self.texture_3 = _Convs(4 * u, 4 * u, kernel=1)
        self.structure = _Resized(8 * u, 4 * u)
        self.join = _Convs(12 * u, 4 * u, kernel=1)
        """One for all: three maps of a branch, and what its three stacks make of them."""
        self.fill = nn.ModuleList(nn.ModuleList(_PartialConv(4 * u, side) for _ in range(5)) for side in (3, 5, 7))
        self.fuse = _Convs(8 * u, 8 * u, kernel=1)
        self.equalize = Equalization(8 * u, scramble=scramble, sigma=sigma)
        self.back_shallow = nn.ModuleList(_Resized(8 * u, w) for w in level_widths(u)[:3])
        self.back_deep = nn.ModuleList(_Convs(*[8 * u] * (n + 1), open_end=True) for n in (1, 2, 3))

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Equalized:
        """maps: six ``(B, C, s, s)`` with s 4S, 2S, S, S/2, S/4, S/8; mask ``(B, 1, 8S, 8S)``, 1 in holes. Raises `ConfigError` for
        others."""
        self._check(maps, mask)
        side = maps[2].shape[-1]
        holes = cell_holes(mask, self.threshold)
        seen = [F.leaky_relu(one, SLOPE) for one in maps]
        texture = [self.texture_1(seen[0]), self.texture_2(seen[1]), self.texture_3(seen[2])]
        structure = [self.structure(one, side) for one in seen[3:]]
        filled_structure, filled_texture = self._filled(structure, holes), self._filled(texture, holes)
        equal = self.equalize(self.fuse(torch.cat([filled_structure, filled_texture], 1)))
        shallow = [back(equal, one.shape[-1]) for back, one in zip(self.back_shallow, maps)]
        told = [*shallow, *(back(equal) for back in self.back_deep)]
        added = [one + more for one, more in zip(maps, told)]
        return Equalized(added, filled_structure, filled_texture, equal, holes)

    def _filled(self, parts: list[Tensor], holes: Tensor) -> Tensor:
        joined = self.join(torch.cat(parts, 1))
        return self.join(torch.cat([_through(stack, joined, ~holes) for stack in self.fill], 1))

    def _check(self, maps: Sequence[Tensor], mask: Tensor) -> None:
        if len(maps) != LEVELS:
            raise ConfigError(f"feature equalization reads {LEVELS} maps, got {len(maps)}")
        side = maps[2].shape[-1]
        sides = (4 * side, 2 * side, side, side // 2, side // 4, side // 8)
        wanted = [(c, s, s) for c, s in zip(level_widths(self.width), sides)]
        found = [tuple(one.shape[1:]) for one in maps]
        if found != wanted or side % 16:
            raise ConfigError(
                f"feature equalization of width {self.width} reads maps {wanted} with a third side that is a multiple of 16, got {found}"
            )
        if tuple(mask.shape) != (len(maps[0]), 1, 8 * side, 8 * side):
            raise ConfigError(f"mask: {tuple(mask.shape)}; ({len(maps[0])}, 1, {8 * side}, {8 * side}) is expected")


class Equalization(nn.Module):
    """What a position is, by all others near it (Gaussian) and by its neighbours that are alike, in one map ``(B, C, S, S)``."""

    def __init__(self, width: int, *, scramble: bool = False, sigma: float = 1.5, reduction: int = 16):
        super().__init__()
        self.scramble, self.sigma = scramble, sigma
        inner = max(1, width // reduction)
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid()
        )
        self.join = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.excite(x)
        both = torch.cat([self.by_distance(x), self.by_likeness(x)], 1)
        return F.leaky_relu(F.instance_norm(self.join(both)), SLOPE)

    def by_distance(self, x: Tensor) -> Tensor:
        """The mean of all positions, weighted by a Gaussian of their distance."""
        rows, columns = (_gaussian(n, self.sigma).to(x) for n in x.shape[-2:])
        return self._read(torch.einsum("ip,jq,bcpq->bijc", rows, columns, x))

    def by_likeness(self, x: Tensor) -> Tensor:
        """The sum of the 3 × 3 positions around each, weighted by how alike their sigmoids are to its own; outside counts as zero."""
        number, width, rows, columns = x.shape
        around = F.unfold(x, 3, padding=1).view(number, width, 9, rows * columns)
        gates = F.unfold(x.sigmoid(), 3, padding=1).view(number, width, 9, rows * columns)
        like = (gates * x.sigmoid().flatten(2)[:, :, None]).mean(1, keepdim=True).softmax(2)
        told = (like * around).sum(2)
        return self._read(told.view(number, width, rows, columns).permute(0, 2, 3, 1))

    def _read(self, told: Tensor) -> Tensor:
        """``(B, S, S, C)`` → ``(B, C, S, S)``."""
        if self.scramble:
            number, rows, columns, width = told.shape
            return told.reshape(number, width, rows, columns)
        return told.permute(0, 3, 1, 2)


def cell_holes(mask: Tensor, threshold: float) -> Tensor:
    """``(B, 1, 8S, 8S)``, 1 in holes → ``(B, 1, S, S)`` bool: cells that three averaging convolutions leave above the threshold."""
    kernel = mask.new_full((1, 1, 4, 4), 1 / 16)
    for _ in range(3):
        mask = F.conv2d(mask, kernel, stride=2, padding=1)
    return mask > threshold


class _Convs(nn.Module):
    """Convolutions without bias, each with a norm of its picture and a leaky rectifier; open_end: none behind the last. kernel 4 halves the
    side, 1 keeps it."""

    def __init__(self, *widths: int, kernel: int = 4, open_end: bool = False):
        super().__init__()
        stride, padding = (2, 1) if kernel == 4 else (1, 0)
        self.open_end = open_end
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel, stride, padding, bias=False) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers, 1):
            x = F.instance_norm(layer(x))
            if not (self.open_end and number == len(self.layers)):
                x = F.leaky_relu(x, SLOPE)
        return x


class _Resized(nn.Module):
    """A map at another side, then one position at a time."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = _Convs(width_in, width, kernel=1)

    def forward(self, x: Tensor, side: int) -> Tensor:
        return self.conv(F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False))


class _PartialConv(nn.Module):
    """A convolution over what is known, divided by how many numbers were; cells that see none stay holes."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, side, padding=side // 2, bias=False)
        self.norm = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        side = self.conv.kernel_size[0]
        shown = known.to(x.dtype)
        count = F.conv2d(shown, shown.new_ones(1, 1, side, side), padding=side // 2) * x.shape[1]
        seen = count > 0
        x = self.conv(x * shown) / count.masked_fill(~seen, 1)
        return F.leaky_relu(self.norm(x.masked_fill(~seen, 0)), SLOPE), seen


def _through(stack: nn.Module, x: Tensor, known: Tensor) -> Tensor:
    for layer in stack:  # type: ignore[union-attr]
        x, known = layer(x, known)
    return x


def _gaussian(number: int, sigma: float) -> Tensor:
    """``(n, n)`` shares: row i over the positions of a line, by a Gaussian around i."""
    places = torch.arange(number, dtype=torch.float64)
    weights = (-((places[:, None] - places) ** 2) / (2 * sigma**2)).exp()
    return weights / weights.sum(1, keepdim=True)
