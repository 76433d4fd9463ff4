"""How do frames that are seen in the light of former ones become few tokens that add to one another (PVC, arXiv 2412.09613)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.joining import join_views
from mllm.connectors.layers import ProjectorConfig, build_projector, read_features, shown, single
from mllm.connectors.pixel_shuffle import space_to_depth
from mllm.errors import ConfigError
from mllm.timed import TimedNorm, relative_times
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout


class PvcConfig(ConnectorConfig):
    """PVC: space to depth, a norm that knows the time, an MLP. A picture is a video of ``repeats`` equal frames: 4 × 64 tokens of an
    InternViT's 32 × 32 map, as published."""

    type: str = "pvc"
    factor: int = Field(default=4, ge=1)
    """factor × factor tokens become one."""
    repeats: int = Field(default=4, ge=1)
    """How often a picture is shown; each time has tokens of its own."""
    time_width: int = Field(default=256, ge=2, multiple_of=2)
    """Width of the time's embedding."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)


@CONNECTORS.register("pvc")
class PvcConnector(Connector):
    """One encoder: ``(V, N, D)`` of V frames → ``(V, N / factor², L)``. Use it beside an encoder of type ``progressive``."""

    Config = PvcConfig
    config: PvcConfig

    def __init__(self, config: PvcConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.view = self.layout(config, encoders)
        (self.encoder,) = self.encoders
        merged = self.encoders[self.encoder].width * config.factor**2
        self.norm = TimedNorm(merged, config.time_width)
        self.projector = build_projector(config.projector, merged, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: PvcConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        name = single("connector pvc", encoders)
        (rows, columns), factor = encoders[name].grid, config.factor
        if rows % factor or columns % factor:
            raise ConfigError(
                f"connector pvc: encoder {name!r} has grid {shown(encoders[name].grid)}, which factor {factor} does not divide; change "
                "factor, or give the encoder an image size whose grid it divides"
            )
        grid = (rows // factor, columns // factor)
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, repeats=config.repeats)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=16, width=24), grid=(4, 6), width=5)
        return {"type": "pvc", "factor": 2, "time_width": 8}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        if layouts is None:
            return self.view_tokens(features, routing, text).flatten(0, 1)
        tokens = self._at(features, routing, relative_times([layout.num_views for layout in layouts]))
        return join_views(tokens, layouts, self.view, self.newline)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Frames that are each a visual's first."""
        return self._at(features, routing, torch.zeros(len(features[self.encoder].tokens)))

    def _at(self, features: Mapping[str, VisionFeatures], routing: Routing | None, times: Tensor) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        merged = space_to_depth(tokens, self.encoders[self.encoder].grid, self.config.factor)
        return self.projector(self.norm(merged, times.to(tokens.device)))
