"""How does a fixed number of learned queries read any number of image tokens?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    at_least,
    attend,
    expert_weight,
    log_weight,
    merge_heads,
    position_sincos,
    read_features,
    split_heads,
    unblind,
)
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class ResamplerConfig(ConnectorConfig):
    """Perceiver-style resampler: learned queries, ``depth`` blocks of cross-attention and feed-forward, fixed 2-D
    positions on the keys (Flamingo, arXiv 2204.14198; Qwen-VL, arXiv 2308.12966, is depth 1)."""

    type: str = "resampler"
    num_queries: int | None = Field(default=None, ge=1)
    """Visual tokens per image; default 64 unless ``grid`` is given."""
    grid: Grid | None = None
    """Instead of ``num_queries``: queries that stand on a grid and carry its 2-D positions."""
    depth: int = Field(default=2, ge=1)
    hidden: int | None = Field(default=None, ge=4)
    """Width inside; default: the language model's."""
    num_heads: int = Field(default=16, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _one_size(self) -> ResamplerConfig:
        if self.num_queries is not None and self.grid is not None:
            raise ValueError("give num_queries or grid, not both")
        return self

    @property
    def output_grid(self) -> Grid:
        return self.grid or (1, self.num_queries or 64)


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention and feed-forward, both residual."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, *, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x ``(B, Q, W)``; keys, values ``(B, N, W)``; positions ``(Q, W)`` of the queries; mask ``(B, 1, 1, N)`` added
        to the attention logits."""
        query = self.query_norm(x)
        query = query if positions is None else query + positions
        query, keys, values = (
            split_heads(layer(tokens), self.num_heads)
            for layer, tokens in ((self.query, query), (self.key, keys), (self.value, values))
        )
        x = x + self.out(merge_heads(attend(query, keys, values, mask=mask)))
        return x + self.mlp(self.mlp_norm(x))


@CONNECTORS.register("resampler")
class ResamplerConnector(Connector):
    """Any encoders, each with its own key projection → ``(B, num_queries, L)``. Experts' log weights are added to
    the attention logits, so absent ones are not read."""

    Config = ResamplerConfig
    config: ResamplerConfig
    uses_routing = True

    def __init__(self, config: ResamplerConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.hidden = config.hidden or width
        if self.hidden % config.num_heads or self.hidden % 4:
            raise ConfigError(
                f"connector resampler: hidden width {self.hidden} must be a multiple of num_heads "
                f"({config.num_heads}) and of 4 (2-D positions); set hidden or num_heads"
            )
        self.queries = nn.Parameter(torch.empty(config.output_grid[0] * config.output_grid[1], self.hidden))
        self.inputs = nn.ModuleDict({n: nn.Linear(e.width, self.hidden) for n, e in self.encoders.items()})
        self.input_norms = nn.ModuleDict({n: nn.LayerNorm(self.hidden) for n in self.encoders})
        self.blocks = nn.ModuleList(
            ResamplerBlock(self.hidden, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(self.hidden)
        self.output = nn.Linear(self.hidden, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: ResamplerConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        at_least("connector resampler", encoders, 1)
        grid = config.output_grid
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, in_place=False)

    @classmethod
    def native_cell(cls, config: ResamplerConfig) -> int | None:
        return 0

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(4, 4), width=6),
            "spatial": EncoderInfo(image=image, grid=(3, 5), width=4),
        }
        return {"type": "resampler", "grid": [2, 3], "num_heads": 2, "mlp_ratio": 2.0}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.output]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.queries, std=1 / math.sqrt(self.hidden))

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        values, positions, biases = [], [], []
        extent = next(iter(self.encoders.values())).grid
        for name, tokens in read_features(self.encoders, features, routing).items():
            values.append(self.input_norms[name](self.inputs[name](tokens)))
            grid = self.encoders[name].grid
            positions.append(position_sincos(grid, self.hidden, extent=extent, device=tokens.device).to(tokens.dtype))
            if routing is not None:
                weight = expert_weight(routing, name)
                bias = tokens.new_zeros(tokens.shape[0]) if weight is None else log_weight(weight)
                biases.append(bias[:, None].expand(-1, tokens.shape[1]))
        value = torch.cat(values, dim=1)
        key = value + torch.cat(positions)
        mask = unblind(torch.cat(biases, dim=1))[:, None, None, :].to(value.dtype) if biases else None
        query_positions = None
        if self.config.grid is not None:
            query_positions = position_sincos(self.config.grid, self.hidden, extent=extent, device=value.device)
            query_positions = query_positions.to(value.dtype)
        x = self.queries.expand(value.shape[0], -1, -1).to(value.dtype)
        for block in self.blocks:
            x = block(x, key, value, positions=query_positions, mask=mask)
        return self.output(self.norm(x))
