"""How are neighbouring tokens merged into one without losing a value?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import ProjectorConfig, build_projector, read_features, shown, single
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class PixelShuffleConfig(ConnectorConfig):
    """Space to depth, then norm and MLP; the defaults are InternVL's ``mlp1`` (arXiv 2404.16821)."""

    type: str = "pixel_shuffle"
    factor: int = Field(default=2, ge=1)
    """factor × factor tokens become one."""
    projector: ProjectorConfig = Field(default_factory=lambda: ProjectorConfig(depth=2, norm_before="layer_norm"))


def space_to_depth(tokens: Tensor, grid: Grid, factor: int) -> Tensor:
    """``(B, rows * cols, D)`` → ``(B, rows * cols / factor², factor² * D)``; a merged token lists its cells row by row,
    each with all its channels (the order of InternVL and Qwen-VL)."""
    batch, _, width = tokens.shape
    rows, cols = grid[0] // factor, grid[1] // factor
    cells = tokens.reshape(batch, rows, factor, cols, factor, width).transpose(2, 3)
    return cells.reshape(batch, rows * cols, factor * factor * width)


@CONNECTORS.register("pixel_shuffle")
class PixelShuffleConnector(Connector):
    """One encoder: ``(B, N, D)`` → ``(B, N / factor², L)``."""

    Config = PixelShuffleConfig
    config: PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        (self.encoder,) = self.encoders
        self.projector = build_projector(config.projector, self.encoders[self.encoder].width * config.factor**2, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: PixelShuffleConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        name = single("connector pixel_shuffle", encoders)
        grid, factor = encoders[name].grid, config.factor
        if grid[0] % factor or grid[1] % factor:
            wanted = ((grid[0] // factor + 1) * factor, (grid[1] // factor + 1) * factor)
            raise ConfigError(
                f"connector pixel_shuffle: encoder {name!r} has grid {shown(grid)}, which factor {factor} does not "
                f"divide; give the encoder an image size whose grid does (for instance {shown(wanted)}), change "
                f"factor, or use connector: {{type: average_pool, grid: [{grid[0] // factor}, {grid[1] // factor}]}}"
            )
        rows, cols = grid[0] // factor, grid[1] // factor
        return ViewLayout(num_tokens=rows * cols, grid=(rows, cols))

    @classmethod
    def native_cell(cls, config: PixelShuffleConfig) -> int | None:
        return config.factor

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=16, width=24), grid=(4, 6), width=5)
        return {"type": "pixel_shuffle"}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        return self.projector(space_to_depth(tokens, self.encoders[self.encoder].grid, self.config.factor))
