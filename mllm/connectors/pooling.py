"""How is an encoder's grid averaged down to fewer tokens?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import ProjectorConfig, build_projector, read_features, resample, shown, single
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class AveragePoolConfig(ConnectorConfig):
    """Average pooling to a grid, then an MLP."""

    type: str = "average_pool"
    grid: Grid
    """Rows and columns of the result."""
    overlap: bool = False
    """Allow grids that do not divide: windows then overlap, as in `torch.nn.AdaptiveAvgPool2d`."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)


def check_pooling(where: str, encoder: str, grid: Grid, target: Grid, *, overlap: bool) -> None:
    """Raise `ConfigError` unless ``grid`` can be averaged down to ``target``."""
    if target[0] < 1 or target[1] < 1 or target[0] > grid[0] or target[1] > grid[1]:
        raise ConfigError(
            f"{where}: encoder {encoder!r} has grid {shown(grid)}, which cannot be averaged to {shown(target)}; "
            f"choose a grid from 1×1 to {shown(grid)}"
        )
    if not overlap and (grid[0] % target[0] or grid[1] % target[1]):
        raise ConfigError(
            f"{where}: encoder {encoder!r} has grid {shown(grid)}, not a multiple of {shown(target)}; choose a "
            f"divisor, give the encoder another image size, or set overlap: true for overlapping windows"
        )


@CONNECTORS.register("average_pool")
class AveragePoolConnector(Connector):
    """One encoder: ``(B, N, D)`` → ``(B, rows * cols, L)``; the average is taken in fp32, before the MLP."""

    Config = AveragePoolConfig
    config: AveragePoolConfig

    def __init__(self, config: AveragePoolConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        (self.encoder,) = self.encoders
        self.projector = build_projector(config.projector, self.encoders[self.encoder].width, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: AveragePoolConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        name = single("connector average_pool", encoders)
        check_pooling("connector average_pool", name, encoders[name].grid, config.grid, overlap=config.overlap)
        return ViewLayout(num_tokens=config.grid[0] * config.grid[1], grid=config.grid)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=16, width=24), grid=(4, 6), width=5)
        return {"type": "average_pool", "grid": [2, 3]}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        return self.projector(resample(tokens, self.encoders[self.encoder].grid, self.config.grid, "area"))
