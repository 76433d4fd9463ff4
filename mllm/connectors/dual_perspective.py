"""How do detail and whole of a picture tell each other what they see: the dual-perspective enhancement of INF-LLaVA?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    attend,
    build_projector,
    merge_heads,
    read_features,
    single,
    split_heads,
)
from mllm.connectors.partitions import crop_parts, join_crops, join_strided, strided_parts
from mllm.errors import AlignmentError, ConfigError
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout


class DualPerspectiveConfig(ConnectorConfig):
    """INF-LLaVA (arXiv 2407.16198), for ``views: {type: dual_perspective}``: as many tokens as one view has, whatever n."""

    type: str = "dual_perspective"
    num_heads: int = Field(default=8, ge=1)
    reduction: Literal["area", "bilinear"] = "area"
    """How the n times larger map reaches the view's grid. area: the mean of every n × n cells. bilinear: the authors', without
    antialiasing, which for n = 3 keeps the middle one of nine cells and drops what the others hold."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)


class PostNormAttention(nn.Module):
    """Queries ``(B, N, D)`` read ``(B, N', D)``; the norm follows the sum with the queries."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.query(x), self.key(context), self.value(context))
        read = merge_heads(attend(*(split_heads(part, self.num_heads) for part in parts)))
        return self.norm(self.out(read) + x)


class DualPerspectiveEnhancement(nn.Module):
    """Local and global map ``(B, D, n · rows, n · columns)`` → the fused map of that size: the global map asks the local one
    tile by tile, the local map asks the global one stride by stride, by one attention."""

    def __init__(self, width: int, num_heads: int = 8):
        super().__init__()
        self.attention = PostNormAttention(width, num_heads)
        self.local_mlp, self.global_mlp = (
            nn.Sequential(nn.Linear(width, width // 16), nn.GELU(), nn.Linear(width // 16, width // 2))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, local: Tensor, overall: Tensor, n: int) -> Tensor:
        overall_attended = join_crops(self._ask(crop_parts(overall, n), crop_parts(local, n)), n)
        local_attended = join_strided(self._ask(strided_parts(local, n), strided_parts(overall, n)), n)
        g, x = overall_attended.permute(0, 2, 3, 1), local_attended.permute(0, 2, 3, 1)
        fused = torch.cat([self.local_mlp(x), self.global_mlp(g)], dim=-1)
        return self.norm(fused + g + x).permute(0, 3, 1, 2)

    def _ask(self, queries: Tensor, context: Tensor) -> Tensor:
        """Parts ``(B, n², D, rows, columns)``, each by itself."""
        batch, parts, _, rows, columns = queries.shape
        x, y = (part.flatten(0, 1).flatten(2).transpose(1, 2) for part in (queries, context))
        read = self.attention(x, y).transpose(1, 2)
        return read.unflatten(2, (rows, columns)).unflatten(0, (batch, parts))


@CONNECTORS.register("dual_perspective")
class DualPerspectiveConnector(Connector):
    """One encoder: crops, strided pictures and thumbnail of a visual → ``(M, L)``, M of one view. A view by itself is its own
    local and global map (n = 1)."""

    Config = DualPerspectiveConfig
    config: DualPerspectiveConfig

    def __init__(self, config: DualPerspectiveConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        (self.encoder,) = self.encoders
        own = self.encoders[self.encoder].width
        self.enhancement = DualPerspectiveEnhancement(own, config.num_heads)
        self.projector = build_projector(config.projector, own, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: DualPerspectiveConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        info = encoders[single("connector dual_perspective", encoders)]
        if info.width % config.num_heads or info.width % 16:
            raise ConfigError(
                f"connector dual_perspective: the encoder's width {info.width} must be a multiple of 16 and of num_heads "
                f"({config.num_heads})"
            )
        return ViewLayout(num_tokens=info.grid[0] * info.grid[1], grid=info.grid, joins_perspectives=True)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=8, width=12), grid=(2, 3), width=16)
        return {"type": "dual_perspective", "num_heads": 4}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        if layouts is None or not all(layout.perspectives for layout in layouts):
            return super().forward(features, routing, text, layouts)
        (tokens,) = read_features(self.encoders, features).values()
        counts = {layout.num_views for layout in layouts} or {3}
        if len(counts) > 1 or len(tokens) != sum(layout.num_views for layout in layouts):
            raise AlignmentError(f"features of {len(tokens)} views where the visuals have {sorted(counts)} each")
        n = layouts[0].perspectives if layouts else 1
        return self._fuse(
            tokens.unflatten(0, (-1, 2 * n * n + 1)) if layouts else tokens[:, None].expand(-1, 3, -1, -1), n
        ).flatten(0, 1)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        return self._fuse(tokens[:, None].expand(-1, 3, -1, -1), 1)

    def _fuse(self, views: Tensor, n: int) -> Tensor:
        """Views ``(B, 2 n² + 1, N, D)`` → ``(B, N, L)``."""
        return self.projector((views[:, -1] + self.enhanced(views[:, :-1], n)) / 2)

    def enhanced(self, views: Tensor, n: int) -> Tensor:
        """n² crops and n² strided pictures ``(B, 2 n², N, D)`` → the fused map at one view's size, ``(B, N, D)``."""
        grid = self.encoders[self.encoder].grid
        maps = views.transpose(2, 3).unflatten(3, grid)
        crops, strided = maps[:, : n * n], maps[:, n * n :]
        fused = self.enhancement(join_crops(crops, n), join_strided(strided, n), n)
        if self.config.reduction == "area":
            small = F.adaptive_avg_pool2d(fused.float(), grid) if n > 1 else fused
        else:
            small = F.interpolate(fused.float(), size=grid, mode="bilinear", align_corners=False)
        return small.to(views.dtype).flatten(2).transpose(1, 2)
