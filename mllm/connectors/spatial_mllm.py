"""How do a geometry encoder's tokens join a semantic encoder's, two frames and 2 × 2 patches at a time (Spatial-MLLM, arXiv
2505.23747)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import ProjectorConfig, build_projector, known_encoder, shown
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures

Version = Literal["1.0", "1.1"]
_EPS = 1e-6


def group_frames(tokens: Tensor, grid: Grid, *, frames: int, side: int, frame_first: bool) -> Tensor:
    """``(F, rows * cols, D)`` → ``(F / frames, rows / side * cols / side, frames * side² * D)``, raster order.

    Inside a token lie (row, column, channel, frame) of its cell, the frame innermost; with ``frame_first`` (frame, row, column,
    channel).
    """
    rows, cols = grid[0] // side, grid[1] // side
    x = tokens.reshape(-1, frames, rows, side, cols, side, tokens.shape[-1])
    order = (0, 2, 4, 1, 3, 5, 6) if frame_first else (0, 2, 4, 3, 5, 6, 1)
    return x.permute(*order).reshape(x.shape[0], rows * cols, frames * side**2 * tokens.shape[-1])


class GeometryMerger(nn.Module):
    """One token of each group of frames and patches. 1.1: RMSNorm, linear, GELU, linear. 1.0: the same, then once more."""

    def __init__(self, version: Version, width_in: int, width_out: int, *, frames: int = 2, side: int = 2):
        super().__init__()
        self.version, self.frames, self.side = version, frames, side
        merged = width_in * frames * side**2
        self.norm = nn.RMSNorm(merged, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, width_out))
        self.second_norm: nn.Module | None = None
        self.second_mlp: nn.Sequential | None = None
        if version == "1.0":
            self.second_norm = nn.RMSNorm(width_out, eps=_EPS)
            self.second_mlp = nn.Sequential(nn.Linear(width_out, width_out), nn.GELU(), nn.Linear(width_out, width_out))

    @property
    def last(self) -> nn.Module:
        """The layer that gives the result."""
        return (self.mlp if self.second_mlp is None else self.second_mlp)[-1]

    def group(self, tokens: Tensor, grid: Grid) -> Tensor:
        """``(F, N, D)`` → ``(F / frames, M, merged)`` in the version's own order."""
        return group_frames(tokens, grid, frames=self.frames, side=self.side, frame_first=self.version == "1.0")

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """``(F, rows * cols, D)`` → ``(F / frames, M, width_out)``."""
        x = self.mlp(self.norm(self.group(tokens, grid)))
        if self.second_norm is not None and self.second_mlp is not None:
            x = self.second_mlp(self.second_norm(x))
        return x


class SpatialMllmConfig(ConnectorConfig):
    """The first encoder says what is seen, ``geometry`` where it is; both see the same frames on the same grid."""

    type: str = "spatial_mllm"
    version: Version = "1.1"
    """Which published connector the geometry goes through; their weights are not interchangeable."""
    geometry: str | None = None
    """The geometry encoder's name; default: the last encoder."""
    temporal_merge: int = Field(default=2, ge=1)
    """Frames that become one set of tokens; a picture stands for so many equal ones."""
    spatial_merge: int = Field(default=2, ge=1)
    """Patches along each side that become one token."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    """From a group of the semantic encoder's patches (the 2-D path; Qwen2.5-VL's merger stands there as published)."""


@CONNECTORS.register("spatial_mllm")
class SpatialMllmConnector(Connector):
    """Two encoders → ``(F / temporal_merge, rows / spatial_merge * cols / spatial_merge, L)``: projected semantics plus geometry."""

    Config = SpatialMllmConfig
    config: SpatialMllmConfig

    def __init__(self, config: SpatialMllmConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.semantic, self.geometry = self._names(config, encoders)
        self.grid = encoders[self.semantic].grid
        group = config.temporal_merge * config.spatial_merge**2
        self.projector = build_projector(config.projector, encoders[self.semantic].width * group, width)
        self.merger = GeometryMerger(
            config.version,
            encoders[self.geometry].width,
            width,
            frames=config.temporal_merge,
            side=config.spatial_merge,
        )
        self.reset_parameters()

    @classmethod
    def _names(cls, config: SpatialMllmConfig, encoders: Mapping[str, EncoderInfo]) -> tuple[str, str]:
        names = list(encoders)
        if len(names) != 2:
            raise ConfigError(
                f"connector spatial_mllm: takes two encoders, semantics and geometry; the model has {len(names)}: "
                f"{', '.join(names) or 'none'}"
            )
        if config.geometry is not None:
            known_encoder("connector spatial_mllm: geometry", config.geometry, encoders)
        geometry = config.geometry or names[1]
        return next(name for name in names if name != geometry), geometry

    @classmethod
    def layout(cls, config: SpatialMllmConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        semantic, geometry = cls._names(config, encoders)
        grid, other, side = encoders[semantic].grid, encoders[geometry].grid, config.spatial_merge
        if grid != other:
            raise ConfigError(
                f"connector spatial_mllm: encoders {semantic!r} and {geometry!r} have grids {shown(grid)} and {shown(other)}; give "
                "them image sizes with equal grids"
            )
        if grid[0] % side or grid[1] % side:
            raise ConfigError(f"connector spatial_mllm: grid {shown(grid)} is no multiple of spatial_merge ({side})")
        grid = (grid[0] // side, grid[1] // side)
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, frames=config.temporal_merge)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(4, 6), width=6),
            "geometry": EncoderInfo(image=image, grid=(4, 6), width=4),
        }
        return {"type": "spatial_mllm"}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1], self.merger.last]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[Any] | None = None,
    ) -> Tensor:
        """As every connector's; with layouts, the views are whole groups of frames, one visual after another."""
        if layouts is None:
            return self.view_tokens(features, routing, text).flatten(0, 1)
        return self._fuse(features[self.semantic].tokens, features[self.geometry].tokens).flatten(0, 1)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Views that each stand for a group of equal frames."""
        often = self.config.temporal_merge
        semantic, geometry = (
            features[name].tokens.repeat_interleave(often, dim=0) for name in (self.semantic, self.geometry)
        )
        return self._fuse(semantic, geometry)

    def _fuse(self, semantic: Tensor, geometry: Tensor) -> Tensor:
        config = self.config
        groups = group_frames(
            semantic, self.grid, frames=config.temporal_merge, side=config.spatial_merge, frame_first=True
        )
        return self.projector(groups) + self.merger(geometry, self.grid)
