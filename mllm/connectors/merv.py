"""How does one softmax weight per encoder mix their tokens (MERV, arXiv 2501.01426)?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.joining import join_views
from mllm.connectors.layers import (
    ProjectorConfig,
    at_least,
    attend,
    build_projector,
    expert_weight,
    log_weight,
    merge_heads,
    read_features,
    split_heads,
    unblind,
)
from mllm.connectors.pooling import check_pooling
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout


class PooledProjector(nn.Module):
    """Adaptive average over frames, rows and columns (in fp32), then an MLP."""

    def __init__(
        self, config: ProjectorConfig, width_in: int, width_out: int, *, grid: Grid, output: Grid, frames: int = 1
    ):
        """grid: of the input; output: of the result; frames: of the result."""
        super().__init__()
        self.grid, self.output = grid, (frames, *output)
        self.projector = build_projector(config, width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, frames, N, D)`` → ``(B, frames' * rows * cols, width_out)``, frame by frame in raster order."""
        volume = x.permute(0, 3, 1, 2).unflatten(-1, self.grid).float()
        pooled = F.adaptive_avg_pool3d(volume, self.output).flatten(2).transpose(1, 2).contiguous()
        return self.projector(pooled.to(x.dtype))


class AttentivePooler(nn.Module):
    """Learned queries read every frame on its own: one cross-attention, one MLP, both residual; then an MLP to the
    output.

    The visual tokens are normed before the attention, the queries are not.
    """

    def __init__(self, config: ProjectorConfig, width_in: int, width_out: int, *, num_queries: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, width_in))
        self.norm, self.mlp_norm = nn.LayerNorm(width_in), nn.LayerNorm(width_in)
        self.query, self.out = nn.Linear(width_in, width_in), nn.Linear(width_in, width_in)
        self.key_value = nn.Linear(width_in, 2 * width_in)
        self.mlp = nn.Sequential(nn.Linear(width_in, 4 * width_in), nn.GELU(), nn.Linear(4 * width_in, width_in))
        self.projector = build_projector(config, width_in, width_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.queries, std=0.02)
        for layer in (self.out, self.mlp[-1]):
            nn.init.trunc_normal_(layer.weight, std=0.02 / math.sqrt(2))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, frames, N, D)`` → ``(B, frames * queries, width_out)``."""
        batch, frames = x.shape[:2]
        x = self.norm(x.flatten(0, 1))
        queries = self.queries.to(x.dtype).expand(batch * frames, -1, -1)
        q = split_heads(self.query(queries), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.key_value(x).chunk(2, dim=-1))
        read = queries + self.out(merge_heads(attend(q, k, v)))
        read = read + self.mlp(self.mlp_norm(read))
        return self.projector(read.unflatten(0, (batch, frames)).flatten(1, 2))


class EncoderMixture(nn.Module):
    """One weight per image and encoder: a learned query attends each encoder's mean token; the values stay unprojected.

    MERV's attention also stores value, output and key-bias parameters that never act; they do not exist here.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, hidden))
        self.query_projection = nn.Linear(hidden, hidden)
        self.key_projection = nn.Linear(width, hidden, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.query)

    def forward(
        self, tokens: Tensor, bias: Tensor | None = None, visuals: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens ``(B, E, T, L)``, bias ``(B, E)`` added to the logits → mixture ``(B, T, L)`` and its weights ``(B,
        E)``. visuals: of how many successive rows the mean is taken together (frames of a video); None: of each alone."""
        means = tokens.mean(dim=2)
        if visuals is not None:
            means = torch.cat([part.mean(dim=0, keepdim=True).expand_as(part) for part in means.split(list(visuals))])
        keys = self.key_projection(means)
        query = self.query_projection(self.query.to(keys.dtype))[0]
        logits = (keys * query).sum(-1).float() / math.sqrt(query.shape[-1])
        weights = (logits if bias is None else logits + bias).softmax(-1)
        return (tokens * weights[:, :, None, None].to(tokens.dtype)).sum(dim=1), weights


class MervConfig(ConnectorConfig):
    """MERV: pool every encoder to one grid, project, mix; the defaults are the released recipe's. Frames of a video are pooled one by
    one and share the encoders' weights."""

    type: str = "merv"
    grid: Grid = (8, 8)
    """Rows and columns of the result."""
    frames: int = Field(default=1, ge=1)
    """So many successive frames of a video become one set of tokens (pooling: average); a picture is all of its frames. With 2, an encoder
    of every frame and one of every second (``video.fewer``) or of tubelets of two (type ``vivit``) lie on one time axis, as published."""
    pooling: Literal["average", "attentive"] = "average"
    """average: adaptive windows, overlapping where grids do not divide. attentive: rows * cols learned queries."""
    num_heads: int = Field(default=8, ge=1)
    """Heads of attentive pooling."""
    hidden: int = Field(default=3072, ge=1)
    """Width of the query that weighs the encoders."""
    projector: ProjectorConfig = Field(default_factory=lambda: ProjectorConfig(depth=1))


@CONNECTORS.register("merv")
class MervConnector(Connector):
    """E encoders → ``(B, rows * cols, L)``: the same softmax weights for all tokens of an image. Experts' log weights
    are added to the logits, so absent ones get none."""

    Config = MervConfig
    config: MervConfig
    uses_routing = True

    def __init__(self, config: MervConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.poolers = nn.ModuleDict({name: self._pooler(info) for name, info in self.encoders.items()})
        self.mixture = EncoderMixture(width, config.hidden)
        self.reset_parameters()

    def _pooler(self, info: EncoderInfo) -> nn.Module:
        config = self.config
        if config.pooling == "average":
            return PooledProjector(config.projector, info.width, self.width, grid=info.grid, output=config.grid)
        queries = config.grid[0] * config.grid[1]
        return AttentivePooler(
            config.projector, info.width, self.width, num_queries=queries, num_heads=config.num_heads
        )

    @classmethod
    def layout(cls, config: MervConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        at_least("connector merv", encoders, 1)
        if config.frames > 1 and config.pooling != "average":
            raise ConfigError(
                f"connector merv: pooling {config.pooling} reads each frame by itself; frames: {config.frames} needs average"
            )
        for name, info in encoders.items():
            if config.pooling == "average":
                check_pooling("connector merv", name, info.grid, config.grid, overlap=True)
            elif info.width % config.num_heads:
                raise ConfigError(
                    f"connector merv: encoder {name!r} has width {info.width}, not a multiple of num_heads "
                    f"({config.num_heads}); set num_heads, or pooling: average"
                )
        return ViewLayout(num_tokens=config.grid[0] * config.grid[1], grid=config.grid, frames=config.frames)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(4, 4), width=6),
            "spatial": EncoderInfo(image=image, grid=(3, 5), width=4),
        }
        return {"type": "merv", "grid": [2, 2], "hidden": 12}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [pooler.projector[-1] for pooler in self.poolers.values()]  # type: ignore[index,union-attr]

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        """As every connector's; with ``frames``, the views of layouts are whole groups of frames, one visual after another."""
        group = self.config.frames
        if layouts is None or (group == 1 and (routing is not None or not any(layout.frames for layout in layouts))):
            return super().forward(features, routing, text, layouts)
        counts = [
            n
            for layout in layouts
            for n in ([layout.num_views // group] if layout.frames else [1] * (layout.num_views // group))
        ]
        tokens = self.mix(features, visuals=counts, frames=group)[0]
        if group > 1:
            return tokens.flatten(0, 1)
        return join_views(tokens, layouts, self.layout(self.config, self.encoders), self.newline)

    def mix(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        visuals: Sequence[int] | None = None,
        *,
        frames: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens ``(B, M, L)`` of B views, or groups of ``frames`` views, and the encoders' weights ``(B, E)``; visuals: see
        `EncoderMixture.forward`."""
        pooled, biases = [], []
        for name, tokens in read_features(self.encoders, features, routing).items():
            pooled.append(self.poolers[name](tokens.unflatten(0, (-1, frames))))
            weight = expert_weight(routing, name)
            biases.append(tokens.new_zeros(pooled[-1].shape[0]) if weight is None else log_weight(weight))
        bias = None if routing is None else unblind(torch.stack([b.float() for b in biases], dim=-1))
        return self.mixture(torch.stack(pooled, dim=1), bias, visuals)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        return self.mix(features, routing)[0]
