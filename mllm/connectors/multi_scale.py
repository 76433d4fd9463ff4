"""How do the maps of one encoder at several scales become one map of wider tokens (S2)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import ProjectorConfig, build_projector, read_features, single
from mllm.connectors.partitions import join_crops
from mllm.errors import AlignmentError
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout


class MultiScaleConfig(ConnectorConfig):
    """S2 (arXiv 2403.13043), for ``views: {type: multi_scale}`` of the same scales: each scale's crops are laid side by side,
    averaged to the encoder's own grid, and stand beside the other scales' in the width."""

    type: str = "multi_scale"
    scales: list[int] = Field(default=[1, 2], min_length=1)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)


@CONNECTORS.register("multi_scale")
class MultiScaleConnector(Connector):
    """One encoder: all crops of a visual → ``(M, L)``, M of one view. A view by itself is its own map at every scale."""

    Config = MultiScaleConfig
    config: MultiScaleConfig

    def __init__(self, config: MultiScaleConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        (self.encoder,) = self.encoders
        self.projector = build_projector(
            config.projector, len(config.scales) * self.encoders[self.encoder].width, width
        )
        self.reset_parameters()

    @classmethod
    def layout(cls, config: MultiScaleConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        grid = encoders[single("connector multi_scale", encoders)].grid
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, joins_scales=tuple(config.scales))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=8, width=12), grid=(2, 3), width=6)
        return {"type": "multi_scale"}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        if not layouts or not all(layout.scales for layout in layouts):
            return super().forward(features, routing, text, layouts)
        (tokens,) = read_features(self.encoders, features).values()
        count = layouts[0].num_views
        if len(tokens) != count * len(layouts):
            raise AlignmentError(f"features of {len(tokens)} views where {len(layouts)} visuals have {count} each")
        return self.projector(self.merged(tokens.unflatten(0, (-1, count)))).flatten(0, 1)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        return self.projector(tokens.repeat(1, 1, len(self.config.scales)))

    def merged(self, views: Tensor) -> Tensor:
        """Crops of all scales ``(B, Σs², N, D)`` → ``(B, N, scales · D)``."""
        grid, parts, start = self.encoders[self.encoder].grid, [], 0
        for scale in self.config.scales:
            crops = views[:, start : start + scale**2].transpose(2, 3).unflatten(3, grid)
            start += scale**2
            whole = join_crops(crops, scale)
            small = F.adaptive_avg_pool2d(whole.float(), grid).to(views.dtype) if scale > 1 else whole
            parts.append(small.flatten(2).transpose(1, 2))
        return torch.cat(parts, dim=-1)
