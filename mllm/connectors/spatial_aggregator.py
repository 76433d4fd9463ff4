"""How does each cell of a grid read its own windows of several encoders' maps (Cambrian-1, arXiv 2406.16860)?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import StrictModel
from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    at_least,
    build_projector,
    check_grid,
    expert_weight,
    known_encoder,
    log_weight,
    read_features,
    resample,
    unblind,
    weigh,
)
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures

# Shape letters here: S = B * cells queries, r = side of an encoder's window, W hidden width.


class BiasFreeMlp(nn.Module):
    """Linear, GELU, linear, no biases."""

    def __init__(self, width_in: int, hidden: int, width_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


def _normed_linear(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width_out, bias=False))


class WindowAttention(nn.Module):
    """One query attends the windows of one or several encoders at once; keys of all encoders lie in one sequence."""

    def __init__(self, query_width: int, window_widths: Sequence[int], hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = _normed_linear(query_width, hidden)
        self.keys = nn.ModuleList(_normed_linear(width, hidden) for width in window_widths)
        self.values = nn.ModuleList(_normed_linear(width, hidden) for width in window_widths)
        self.out = nn.Linear(hidden, query_width, bias=False)

    def forward(self, query: Tensor, windows: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """query ``(S, 1, W)``, windows ``(S, r², D)`` each, bias ``(S, all keys)`` added to the logits → ``(S, 1,
        W)``."""
        heads = (self.num_heads, -1)
        q = self.query(query).squeeze(1).unflatten(-1, heads)
        k = torch.cat([layer(w) for layer, w in zip(self.keys, windows)], dim=1).unflatten(-1, heads)
        v = torch.cat([layer(w) for layer, w in zip(self.values, windows)], dim=1).unflatten(-1, heads)
        # One query per row: two einsums, where a fused kernel would be launched on B * cells rows of length 1.
        scores = torch.einsum("shd,skhd->shk", q, k).float() / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias[:, None, :]
        return self.out(torch.einsum("shk,skhd->shd", scores.softmax(-1).to(v.dtype), v).flatten(1).unsqueeze(1))


class AggregatorLayer(nn.Module):
    """Query and context in, one update of the query out; ``joint`` attends all windows at once, ``sep`` each encoder on
    its own (an MLP where the window is one cell) and mixes them by softmax weights from query and context."""

    def __init__(
        self,
        query_width: int,
        context_width: int,
        window_widths: Sequence[int],
        windows: Sequence[int],
        *,
        hidden: int,
        num_heads: int,
        sampler: Literal["joint", "sep"],
    ):
        super().__init__()
        self.sampler = sampler
        self.context = nn.Linear(context_width, hidden, bias=False)
        self.input = nn.Linear(query_width + hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.output = BiasFreeMlp(hidden, hidden, query_width)
        self.positions = nn.ParameterDict(
            {str(i): torch.empty(r * r, w) for i, (r, w) in enumerate(zip(windows, window_widths)) if r > 1}
        )
        if sampler == "joint":
            self.attention = WindowAttention(hidden, window_widths, hidden, num_heads)
        else:
            self.mixture = BiasFreeMlp(query_width + hidden, hidden, len(windows))
            self.readers = nn.ModuleList(
                WindowAttention(hidden, [width], hidden, num_heads) if r > 1 else BiasFreeMlp(width, hidden, hidden)
                for r, width in zip(windows, window_widths)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for position in self.positions.values():
            nn.init.normal_(position, std=1 / math.sqrt(position.shape[-1]))

    def forward(
        self, query: Tensor, context: Tensor, windows: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> Tensor:
        windows = [w + self.positions[str(i)] if str(i) in self.positions else w for i, w in enumerate(windows)]
        joined = torch.cat([query, self.context(context)], dim=-1)
        hidden = self.input(joined)
        if self.sampler == "joint":
            read = self.attention(hidden, windows, None if biases is None else torch.cat(list(biases), dim=1))
        else:
            read = self._mix(joined, hidden, windows, biases)
        return query + self.output(self.norm(hidden + read))

    def _mix(
        self, joined: Tensor, hidden: Tensor, windows: Sequence[Tensor], biases: Sequence[Tensor] | None
    ) -> Tensor:
        logits = self.mixture(joined).float()
        if biases is not None:
            logits = logits + torch.stack([bias.amax(dim=1) for bias in biases], dim=-1)[:, None, :]
        shares = logits.softmax(-1).to(hidden.dtype)
        reads = [
            reader(hidden, [w], None if biases is None else unblind(biases[i]))
            if isinstance(reader, WindowAttention)
            else reader(w)
            for i, (reader, w) in enumerate(zip(self.readers, windows))
        ]
        return (torch.cat(reads, dim=1) * shares.transpose(1, 2)).sum(dim=1, keepdim=True)


class SpatialAggregator(nn.Module):
    """``depth`` aggregator layers with one context. Sizes as in Cambrian-1's VisionTokenSampler."""

    def __init__(
        self,
        query_width: int,
        context_width: int,
        window_widths: Sequence[int],
        windows: Sequence[int],
        *,
        hidden: int,
        depth: int,
        num_heads: int = 16,
        sampler: Literal["joint", "sep"] = "joint",
    ):
        """window_widths, windows: channels and side r of every encoder's window, in order."""
        super().__init__()
        if hidden % num_heads:
            raise ConfigError(f"spatial_aggregator: hidden width {hidden} is not a multiple of num_heads ({num_heads})")
        self.layers = nn.ModuleList(
            AggregatorLayer(
                query_width, context_width, window_widths, windows, hidden=hidden, num_heads=num_heads, sampler=sampler
            )
            for _ in range(depth)
        )

    def forward(
        self, query: Tensor, context: Tensor, windows: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> Tensor:
        """query and context ``(S, 1, D)``, windows ``(S, r², D)`` per encoder, biases ``(S, r²)`` per encoder, added to
        the logits of its keys (``-inf``: not seen) → ``(S, 1, D)``. A row with no key in sight reads all of them."""
        if biases is not None:
            blind = (torch.cat(list(biases), dim=1) == float("-inf")).all(dim=1, keepdim=True)
            biases = [bias.masked_fill(blind, 0.0) for bias in biases]
        for layer in self.layers:
            query = layer(query, context, windows, biases)
        return query


def window_partition(tokens: Tensor, grid: Grid, side: int) -> Tensor:
    """``(B, rows * side * cols * side, D)`` → ``(B * rows * cols, side², D)``: the cells that lie under each grid
    position."""
    batch, _, width = tokens.shape
    rows, cols = grid
    cells = tokens.reshape(batch, rows, side, cols, side, width).transpose(2, 3)
    return cells.reshape(batch * rows * cols, side * side, width)


class InsideConfig(StrictModel):
    """Cambrian-1's samplers inside the language model; the defaults are those of its 8B model."""

    count: int = Field(default=10, ge=1)
    start: int = Field(default=0, ge=0)
    """The first layer (from 0) behind which there is one."""
    stride: int = Field(default=3, ge=1)
    depth: int = Field(default=1, ge=1)
    """Aggregator layers of each."""

    @property
    def layers(self) -> list[int]:
        """Layers behind which there is one."""
        return [self.start + number * self.stride for number in range(self.count)]


class SpatialAggregatorConfig(ConnectorConfig):
    """Cambrian-1's spatial vision aggregator; the defaults are its 8B recipe without the samplers inside the language model."""

    type: str = "spatial_aggregator"
    grid: Grid = (24, 24)
    """Rows and columns of the result."""
    windows: dict[str, int] = Field(default_factory=dict)
    """Encoder → side r of the window under one cell; its map is brought to r * grid. Default: its rows over grid
    rows."""
    interpolation: Literal["bilinear", "none"] = "bilinear"
    """none: every encoder's grid must be r * grid already."""
    hidden: int = Field(default=1024, ge=1)
    depth: int = Field(default=3, ge=1)
    num_heads: int = Field(default=16, ge=1)
    sampler: Literal["joint", "sep"] = "joint"
    row_separators: bool = True
    """A learned token closes every row (`ViewLayout.row_separators`)."""
    inside: InsideConfig | None = None
    """Let the visual tokens read their windows again behind several layers of the language model."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)

    def side(self, encoder: str, info: EncoderInfo) -> int:
        """r of one encoder."""
        return self.windows.get(encoder) or max(1, round(info.grid[0] / self.grid[0]))


class InsideSampler(nn.Module):
    """An aggregator whose queries are the language model's hidden states of visual tokens."""

    def __init__(self, config: SpatialAggregatorConfig, depth: int, sides: Sequence[int], width: int):
        super().__init__()
        self.windows, self.hidden, hidden = [side * side for side in sides], config.hidden, config.hidden
        self.aggregator = SpatialAggregator(
            width,
            hidden,
            [hidden] * len(sides),
            sides,
            hidden=hidden,
            depth=depth,
            num_heads=config.num_heads,
            sampler=config.sampler,
        )

    def forward(self, hidden: Tensor, beside: Tensor) -> Tensor:
        """hidden ``(n, L)``, beside ``(n, X)`` as `beside_tokens` lays it out → ``(n, L)``; tokens without windows (row separators)
        stay as they are."""
        keys = sum(self.windows)
        context, windows, weights, cell = beside.split([self.hidden, keys * self.hidden, len(self.windows), 1], dim=-1)
        each = windows.unflatten(-1, (keys, self.hidden)).split(self.windows, dim=1)
        biases = [
            log_weight(weight)[:, None].expand(-1, count)
            for weight, count in zip(weights.unbind(dim=-1), self.windows, strict=True)
        ]
        read = self.aggregator(hidden[:, None], context[:, None], each, biases)[:, 0]
        return torch.where(cell > 0.5, read.to(hidden.dtype), hidden)


def beside_width(hidden: int, sides: Sequence[int]) -> int:
    """Channels of what an `InsideSampler` reads of a token: context, windows, a weight an encoder, and whether it has any."""
    return hidden * (1 + sum(side * side for side in sides)) + len(sides) + 1


def beside_tokens(context: Tensor, windows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """context ``(S, W)``, windows ``(S, r², W)`` per encoder, weights ``(S, E)`` (0: not read) → ``(S, X)``."""
    parts = [
        context,
        *(window.flatten(1) for window in windows),
        weights.to(context.dtype),
        torch.ones_like(context[:, :1]),
    ]
    return torch.cat(parts, dim=-1)


@CONNECTORS.register("spatial_aggregator")
class SpatialAggregatorConnector(Connector):
    """E encoders → ``(B, rows * (cols + 1), L)`` with row separators; the first encoder's mean is the global context.
    Experts' log weights are added to the logits of their keys, so absent ones are not read."""

    Config = SpatialAggregatorConfig
    config: SpatialAggregatorConfig
    uses_routing = True

    def __init__(self, config: SpatialAggregatorConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        hidden = config.hidden
        self.sides = {name: config.side(name, info) for name, info in self.encoders.items()}
        inputs = ProjectorConfig(depth=2, norm_after="layer_norm")
        self.inputs = nn.ModuleDict({n: build_projector(inputs, e.width, hidden) for n, e in self.encoders.items()})
        self.query = nn.Parameter(torch.empty(hidden))
        self.aggregator = SpatialAggregator(
            hidden,
            hidden,
            [hidden] * len(self.encoders),
            list(self.sides.values()),
            hidden=hidden,
            depth=config.depth,
            num_heads=config.num_heads,
            sampler=config.sampler,
        )
        self.projector = build_projector(config.projector, hidden, width)
        self.row_separator = nn.Parameter(torch.empty(width)) if config.row_separators else None
        inside, sides = config.inside, list(self.sides.values())
        self.inside: Any = (
            None
            if inside is None
            else nn.ModuleList(InsideSampler(config, inside.depth, sides, width) for _ in inside.layers)
        )
        self.reset_parameters()

    @property
    def token_width(self) -> int:
        return self.width + self.layout(self.config, self.encoders).beside

    def readers(self) -> dict[int, nn.Module]:
        inside = self.config.inside
        return {} if inside is None else dict(zip(inside.layers, self.inside, strict=True))

    @classmethod
    def layout(cls, config: SpatialAggregatorConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        where = "connector spatial_aggregator"
        at_least(where, encoders, 1)
        for name, side in config.windows.items():
            known_encoder(f"{where}: windows", name, encoders)
            if side < 1:
                raise ConfigError(f"{where}: windows.{name} is {side}; a window has at least one cell")
        rows, cols = config.grid
        for name, info in encoders.items():
            side = config.side(name, info)
            check_grid(where, name, info.grid, (rows * side, cols * side), config.interpolation)
        sides = [config.side(name, info) for name, info in encoders.items()]
        return ViewLayout(
            num_tokens=rows * (cols + config.row_separators),
            grid=config.grid,
            row_separators=config.row_separators,
            beside=0 if config.inside is None else beside_width(config.hidden, sides),
        )

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(3, 3), width=6),
            "spatial": EncoderInfo(image=image, grid=(5, 5), width=4),
        }
        config = {"type": "spatial_aggregator", "grid": [2, 3], "hidden": 8, "depth": 2, "num_heads": 2}
        return config, encoders, 12

    def output_layers(self) -> list[nn.Module]:
        inside = [layer.output.linear_2 for reader in self.inside or () for layer in reader.aggregator.layers]
        return [self.projector[-1], *inside]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.query, std=1 / math.sqrt(self.config.hidden))
        if self.row_separator is not None:
            nn.init.normal_(self.row_separator, std=1 / math.sqrt(self.width))

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        rows, cols = self.config.grid
        windows, biases, weights, context = [], [], [], None
        for name, tokens in read_features(self.encoders, features, routing).items():
            side, weight = self.sides[name], expert_weight(routing, name)
            tokens = resample(tokens, self.encoders[name].grid, (rows * side, cols * side), "bilinear")
            tokens = self.inputs[name](tokens)
            context = weigh(tokens, weight).mean(dim=1, keepdim=True) if context is None else context
            windows.append(window_partition(tokens, self.config.grid, side))
            weights.append(tokens.new_ones(tokens.shape[0]) if weight is None else weight.to(tokens.dtype))
            if routing is not None:
                bias = tokens.new_zeros(tokens.shape[0]) if weight is None else log_weight(weight)
                biases.append(bias.float().repeat_interleave(rows * cols)[:, None].expand(-1, side * side))
        assert context is not None
        batch = context.shape[0]
        query = self.query.to(context.dtype).expand(batch * rows * cols, 1, -1)
        context = context.repeat_interleave(rows * cols, dim=0)
        read = self.aggregator(query, context, windows, biases or None)
        result = self.projector(read.reshape(batch, rows, cols, self.config.hidden))
        if self.inside is not None:
            each = torch.stack(weights, dim=-1).repeat_interleave(rows * cols, dim=0)
            beside = beside_tokens(context[:, 0], windows, each).view(batch, rows, cols, -1)
            result = torch.cat([result, beside], dim=-1)
        if self.row_separator is not None:
            closing = F.pad(self.row_separator, (0, result.shape[-1] - self.width))
            result = torch.cat([result, closing.to(result.dtype).expand(batch, rows, 1, -1)], dim=2)
        return result.flatten(1, 2)
