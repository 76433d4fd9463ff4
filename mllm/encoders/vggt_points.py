"""Where in space does VGGT say that each pixel of several views lies? Its point head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.weights import load_exactly
from mllm.errors import ConfigError
from mllm.types import Grid

LAYERS = (5, 12, 18, 24)
"""Layers of VGGT-1B's aggregator that its head reads, counted from 1."""
_CHANNELS, _FUSED, _LAST, _BASE = (256, 512, 1024, 1024), 256, 32, 100.0


class ResidualConvs(nn.Module):
    """Two convolutions beside what they are given, from which all that is negative is taken away first (as upstream, where the activation
    works in place)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


class Fusion(nn.Module):
    """One step of DPT (arXiv 2103.13413) from a coarse map to the next finer one."""

    def __init__(self, width: int, *, first: bool):
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        if not first:
            self.resConfUnit1 = ResidualConvs(width)
        self.resConfUnit2 = ResidualConvs(width)

    def forward(self, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out_conv(x)


class PointHead(nn.Module):
    """VGGT's DPT head for points. width: of the features that it reads; channels, fused: of its maps."""

    def __init__(
        self, width: int, *, patch_size: int = 14, channels: Sequence[int] = _CHANNELS, fused: int = _FUSED
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
            setattr(self.scratch, f"refinenet{number}", Fusion(fused, first=number == len(channels)))
        self.scratch.output_conv1 = nn.Conv2d(fused, fused // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(fused // 2, _LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(_LAST, 4, 1)
        )

    def forward(self, layers: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        """Patches ``(B, N, 2 C)`` of four layers on a grid → points ``(B, H, W, 3)`` as the reference view has them, and how sure of them
        the head is ``(B, H, W)``, at least 1."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        maps: list[Tensor] = []
        for number, tokens in enumerate(layers):
            x = self.projects[number](self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            x = self.resize_layers[number](x + place_waves(x, size))
            maps.append(getattr(self.scratch, f"layer{number + 1}_rn")(x))
        x = self._fuse(4, maps[3], None, maps[2].shape[2:])
        x = self._fuse(3, x, maps[2], maps[1].shape[2:])
        x = self._fuse(2, x, maps[1], maps[0].shape[2:])
        x = self._fuse(1, x, maps[0], [2 * length for length in maps[0].shape[2:]])
        x = F.interpolate(self._scratch("output_conv1")(x), size=size, mode="bilinear", align_corners=True)
        told = self._scratch("output_conv2")(x + place_waves(x, size)).permute(0, 2, 3, 1)
        places, confidence = told[..., :3], told[..., 3]
        return places.sign() * places.abs().expm1(), 1 + confidence.exp()

    def _fuse(self, number: int, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        return self._scratch(f"refinenet{number}")(x, finer, size)

    def _scratch(self, name: str) -> Any:
        return getattr(self.scratch, name)


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


class PointReader:
    """VGGT with its point head, in fp32 behind an encoder of any dtype.

    Args:
        encoder: of type ``vggt``, resolved for the size of the views, with ``layers`` those that the head reads.

    Raises:
        ConfigError: the encoder's layers are not four.
    """

    def __init__(self, encoder: VggtEncoder):
        if len(encoder.config.layers) != len(_CHANNELS):
            raise ConfigError(f"layers: the point head reads four layers; the encoder gives {encoder.config.layers}")
        self.encoder = encoder
        self.head = PointHead(2 * encoder.config.width, patch_size=encoder.config.patch_size)

    def load(self) -> None:
        """Read encoder and head from ``config.weights``. Raises `CheckpointError`, `UnavailableError`."""
        self.encoder.load_pretrained()
        source, state = self.encoder.published({f"point_head.{key}" for key in self.head.state_dict()})
        own = {key.removeprefix("point_head."): value for key, value in state.items() if key.startswith("point_head.")}
        load_exactly(self.head, own or state, source=f"{source} (its point_head)")

    @torch.no_grad()
    def read(self, pixels: Tensor, *, at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Points and confidence of the views of one scene.

        Args:
            pixels: ``(S, 3, H, W)``, normalised as the encoder's ``info.image`` says; the first view is the reference.
            at_once: views that the head takes at a time.

        Returns:
            Points ``(S, H, W, 3)`` and confidence ``(S, H, W)``, float32, on the CPU. Their unit is the scene's own.
        """
        features = self.encoder(pixels, scene_ids=torch.zeros(len(pixels), dtype=torch.long, device=pixels.device))
        layers = features.tokens.float().chunk(len(_CHANNELS), dim=-1)
        found = [
            self.head([layer[begin : begin + at_once] for layer in layers], features.grid)
            for begin in range(0, len(pixels), at_once)
        ]
        points, confidence = (torch.cat([one.cpu() for one in parts]) for parts in zip(*found, strict=True))
        return points, confidence
