"""How does a second sensor's map add to a first one's, as far as a gate lets it (Doracamom, arXiv 2501.15394)?

Written from a description of TJRadarLab/Doracamom (Apache-2.0) and checked by its numbers; its detector and its deformable attention are
not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    at_least,
    build_projector,
    known_encoder,
    read_features,
    resample,
)
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout

Norm = Literal["layer_norm", "batch_norm"]
_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_EPS = 1e-3


def _norm(kind: Norm, width: int, dims: int) -> nn.Module:
    return _BATCH_NORM[dims](width, eps=_EPS) if kind == "batch_norm" else nn.GroupNorm(1, width)


class ConvNorm(nn.Module):
    """A convolution of side 3 and a norm over ``dims`` axes."""

    def __init__(self, width_in: int, width: int, dims: int, norm: Norm, *, bias: bool = True):
        super().__init__()
        self.conv = _CONV[dims](width_in, width, 3, padding=1, bias=bias)
        self.norm = _norm(norm, width, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class GatedFusion(nn.Module):
    """Two maps ``(B, C, *axes)`` of ``dims`` axes become one: what both make together times its own sigmoid gate, plus the first.

    The second map reaches the result through the fused term alone; ``add_second`` adds it as well (the published default is not to).
    norm batch_norm is the published one: in training a picture then depends on the others of its batch.
    """

    def __init__(
        self,
        width: int,
        width_second: int | None = None,
        *,
        dims: int = 2,
        norm: Norm = "batch_norm",
        bias: bool = True,
    ):
        super().__init__()
        self.fuse = ConvNorm(width + (width_second or width), width, dims, norm, bias=bias)
        self.gate = nn.Sequential(
            ConvNorm(width, width, dims, norm), nn.ReLU(), ConvNorm(width, width, dims, norm), nn.Sigmoid()
        )

    def forward(self, first: Tensor, second: Tensor, *, add_second: bool = False) -> Tensor:
        fused = self.fuse(torch.cat([first, second], 1)).relu()
        result = fused * self.gate(fused) + first
        return result + second if add_second else result


class FrameBottleneck(nn.Module):
    """Maps of ``frames`` moments, oldest first, ``(B, frames, C, *axes)`` → the map of the last moment that knows the others,
    ``(B, width, *axes)``: a residual bottleneck over their channels, side by side."""

    def __init__(
        self,
        width_in: int,
        width: int,
        frames: int,
        *,
        dims: int = 2,
        norm: Norm = "batch_norm",
    ):
        super().__init__()
        self.frames = frames
        wide = width_in * frames
        conv = _CONV[dims]
        self.reduce, self.norm1 = conv(wide, width, 1, bias=False), _norm(norm, width, dims)
        self.mix, self.norm2 = conv(width, width, 3, padding=1, bias=False), _norm(norm, width, dims)
        self.expand, self.norm3 = conv(width, width, 1, bias=False), _norm(norm, width, dims)
        self.shortcut, self.shortcut_norm = conv(wide, width, 1, bias=False), _norm(norm, width, dims)

    def forward(self, maps: Tensor) -> Tensor:
        x = self.padded(maps).flatten(1, 2)
        y = self.norm1(self.reduce(x)).relu()
        y = self.norm2(self.mix(y)).relu()
        return (self.norm3(self.expand(y)) + self.shortcut_norm(self.shortcut(x))).relu()

    def padded(self, maps: Tensor) -> Tensor:
        """Moments that are absent are copies of the oldest one."""
        absent = self.frames - maps.shape[1]
        return maps if absent <= 0 else torch.cat([maps[:, :1].expand(-1, absent, *maps.shape[2:]), maps], 1)


class GatedFusionConfig(ConnectorConfig):
    """Two encoders, the second of another sensor or another make: its map adds to the first one's through a gate at every position and
    channel (camera and radar as published; depth beside colour, convolutions beside a ViT)."""

    type: str = "gated_fusion"
    first: str | None = None
    """The encoder whose map passes as it is and sets the grid; default: the first of the model."""
    width: int = Field(default=256, ge=1)
    """Channels in which the two meet."""
    norm: Norm = "layer_norm"
    """layer_norm: over all of a picture's map, so that no picture depends on another. batch_norm: as published; it needs pictures in every
    batch of every process."""
    add_second: bool = False
    """Also add the second map past the gate."""
    frames: int = Field(default=1, ge=1)
    """More than one: so many successive frames of a video become one map first, each sensor's by itself; a picture is all of its frames."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)

    def roles(self, encoders: Mapping[str, EncoderInfo]) -> tuple[str, str]:
        """Names of the first and the second encoder. Raises `ConfigError`."""
        where = "connector gated_fusion"
        at_least(where, encoders, 2)
        if len(encoders) > 2:
            raise ConfigError(f"{where}: joins two encoders, the model has {len(encoders)}: {', '.join(encoders)}")
        first = known_encoder(f"{where}: first", self.first, encoders) if self.first else next(iter(encoders))
        return first, next(name for name in encoders if name != first)


@CONNECTORS.register("gated_fusion")
class GatedFusionConnector(Connector):
    """Two encoders → ``(F / frames, rows * cols, L)`` on the first one's grid."""

    Config = GatedFusionConfig
    config: GatedFusionConfig

    def __init__(self, config: GatedFusionConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.grid = self.layout(config, encoders).grid
        self.roles = config.roles(encoders)
        first, second = (encoders[name].width for name in self.roles)
        self.frame_fusion: nn.ModuleDict | None = None
        if config.frames > 1:
            self.frame_fusion = nn.ModuleDict(
                {
                    name: FrameBottleneck(encoders[name].width, config.width, config.frames, norm=config.norm)
                    for name in self.roles
                }
            )
            first = second = config.width
        self.enter = ConvNorm(first, config.width, 2, config.norm)
        self.widen = nn.Identity() if second == config.width else nn.Conv2d(second, config.width, 1)
        self.fusion = GatedFusion(config.width, norm=config.norm)
        self.projector = build_projector(config.projector, config.width, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: GatedFusionConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        grid = encoders[config.roles(encoders)[0]].grid
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, frames=config.frames)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "camera": EncoderInfo(image=image, grid=(3, 4), width=6),
            "radar": EncoderInfo(image=image, grid=(2, 2), width=10),
        }
        return {"type": "gated_fusion", "width": 8}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        """As every connector's; with ``frames``, the views of layouts are whole groups of frames, one visual after another."""
        if layouts is None or self.config.frames == 1:
            return super().forward(features, routing, text, layouts)
        maps = self._maps(features, routing)
        return self._fuse([one.unflatten(0, (-1, self.config.frames)) for one in maps]).flatten(0, 1)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Views that each stand for a group of equal frames."""
        return self._fuse([one[:, None] for one in self._maps(features, routing)])

    def _maps(self, features: Mapping[str, VisionFeatures], routing: Routing | None) -> list[Tensor]:
        tokens = read_features(self.encoders, features, routing)
        found = [resample(tokens[name], self.encoders[name].grid, self.grid, "bilinear") for name in self.roles]
        return [one.transpose(1, 2).unflatten(2, self.grid) for one in found]

    def _fuse(self, frames: list[Tensor]) -> Tensor:
        """Maps ``(B, 1 or frames, D, rows, cols)`` of both → ``(B, rows * cols, L)``."""
        if self.frame_fusion is None:
            first, second = (one[:, -1] for one in frames)
        else:
            first, second = (self.frame_fusion[name](one) for name, one in zip(self.roles, frames))
        fused = self.fusion(self.enter(first).relu(), self.widen(second), add_second=self.config.add_second)
        return self.projector(fused.flatten(2).transpose(1, 2))
