"""How are several encoders joined position by position, on channels?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    Interpolation,
    ProjectorConfig,
    at_least,
    build_projector,
    check_grid,
    expert_weight,
    known_encoder,
    read_features,
    resample,
    resampled_width,
    weigh,
)
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class ChannelConcatConfig(ConnectorConfig):
    """Any number of encoders, concatenated on channels on one grid, then an MLP.

    Prismatic (arXiv 2402.07865): ``projector: {depth: 3, hidden: [4x, out]}``. Eagle (arXiv 2408.15998):
    ``grid: [32, 32]``, ``interpolation: {clip: bilinear_corners, sam: pixel_unshuffle}``.
    """

    type: str = "channel_concat"
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    grid: Grid | None = None
    """Rows and columns of the result; default: the first encoder's grid."""
    interpolation: Interpolation | dict[str, Interpolation] = "bilinear"
    """How an encoder with another grid gets there: one way for all, or by encoder name (others: bilinear)."""
    weighting: Literal["scale", "select"] = "scale"
    """What an expert's weight does to its features. scale: multiplies them. select: 1 where it runs, 0 elsewhere."""

    def method(self, encoder: str) -> Interpolation:
        return (
            self.interpolation.get(encoder, "bilinear") if isinstance(self.interpolation, dict) else self.interpolation
        )


@CONNECTORS.register("channel_concat")
class ChannelConcatConnector(Connector):
    """E encoders → ``(B, rows * cols, L)``: features resampled to one grid in fp32, absent experts' channels zero."""

    Config = ChannelConcatConfig
    config: ChannelConcatConfig
    uses_routing = True

    def __init__(self, config: ChannelConcatConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.grid = self.layout(config, encoders).grid
        joined = sum(resampled_width(e.width, e.grid, self.grid, config.method(n)) for n, e in self.encoders.items())
        self.projector = build_projector(config.projector, joined, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: ChannelConcatConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        at_least("connector channel_concat", encoders, 1)
        grid = config.grid or next(iter(encoders.values())).grid
        for name in config.interpolation if isinstance(config.interpolation, dict) else ():
            known_encoder("connector channel_concat: interpolation", name, encoders)
        for name, info in encoders.items():
            check_grid("connector channel_concat", name, info.grid, grid, config.method(name))
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(4, 4), width=6),
            "spatial": EncoderInfo(image=image, grid=(8, 8), width=4),
            "text": EncoderInfo(image=image, grid=(3, 5), width=5),
        }
        return {"type": "channel_concat", "interpolation": {"spatial": "pixel_unshuffle"}}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        joined = []
        for name, tokens in read_features(self.encoders, features, routing).items():
            tokens = resample(tokens, self.encoders[name].grid, self.grid, self.config.method(name))
            joined.append(weigh(tokens, expert_weight(routing, name, select=self.config.weighting == "select")))
        return self.projector(torch.cat(joined, dim=-1))
