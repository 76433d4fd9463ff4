"""How do many layers of two encoders on unlike grids become one set of tokens (CoME-VL, arXiv 2604.03231)?

Written from a description of mbzuai-oryx/CoME-VL (Apache-2.0). Its third rotary axis, the crop's number, turns queries and keys of one
crop alike, so it changes nothing and is left out; its channels stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import attend, known_encoder, merge_heads, read_features, shown, split_heads
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures

_SLOWEST = 256.0
"""The lowest rotary frequency is the highest one's so many-th part."""


class ComeVlConfig(ConnectorConfig):
    """CoME-VL: layers of each encoder mixed through orthogonal maps, both maps pooled, the first encoder's tokens reading the second's
    near the same place. As many tokens as the first encoder's pooled map has."""

    type: str = "come_vl"
    layers: dict[str, int] = Field(default_factory=dict)
    """Encoder → how many layers of it are mixed: as many as its own ``layers`` names, all of one width. Default: 1 each."""
    pool: int = Field(default=2, ge=1)
    """pool × pool tokens of each map become one, their mean reading them (1: none)."""
    pool_heads: int = Field(default=16, ge=1)
    num_heads: int = Field(default=8, ge=1)
    """Of the attention across encoders."""
    reach: float | None = Field(default=0.25, gt=0)
    """How far away a token may read, in sides of the picture; None: everywhere."""
    expansion: int = Field(default=4, ge=1)
    """Of the gated MLP behind the second encoder's layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In that MLP."""


class OrthogonalLinear(nn.Module):
    """A square map that stays orthogonal while it learns: ``base`` times the exponential of a skew matrix, computed in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.skew = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("base", torch.eye(width))
        self.base: Tensor

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.skew)
        nn.init.eye_(self.base)

    @property
    def weight(self) -> Tensor:
        """``(D, D)``, fp32."""
        lower = self.skew.float().tril()
        return self.base.float() @ torch.linalg.matrix_exp(lower - lower.T)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LayerMix(nn.Module):
    """K layers ``(…, K, D)`` → ``(…, D)``: each normed and mapped, their learned mean normed and mapped again."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.each, self.joined = OrthogonalLinear(width), OrthogonalLinear(width)
        self.logits = nn.Parameter(torch.zeros(count))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logits)

    def forward(self, layers: Tensor) -> Tensor:
        shares = self.logits.float().softmax(0).to(layers.dtype)
        mean = (self.each(self.norm(layers)) * shares[:, None]).sum(-2)
        return self.joined(self.norm(mean))


class GatedMlp(nn.Module):
    """``x + W (a · gelu(b))`` of the normed tokens."""

    def __init__(self, width: int, expansion: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * expansion * width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(self.norm(x)).chunk(2, dim=-1)
        return x + self.out(self.drop(value * F.gelu(gate)))


class WindowPool(nn.Module):
    """Windows ``(…, S, D)`` → ``(…, D)``: a window's mean reads the window."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, windows: Tensor) -> Tensor:
        flat = windows.flatten(0, -3)
        parts = (self.query(flat.mean(-2, keepdim=True)), self.key(flat), self.value(flat))
        read = merge_heads(attend(*(split_heads(part, self.num_heads) for part in parts)))
        return self.out(read).squeeze(-2).unflatten(0, windows.shape[:-2])


class CrossEncoderAttention(nn.Module):
    """Tokens ``(B, N, W)`` of one map read ``(B, N', W)`` of another, turned by where both stand in the picture, by frequencies that
    are learned; nothing farther than ``reach`` is read."""

    def __init__(self, width: int, num_heads: int, reach: float | None):
        super().__init__()
        self.num_heads, self.reach = num_heads, reach
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.frequencies = nn.Parameter(torch.empty(2, width // num_heads // 6))
        """Of rows and columns, in quarter turns a side of the picture."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        pairs = self.frequencies.shape[1]
        with torch.no_grad():
            self.frequencies.copy_(torch.exp(torch.linspace(0, -math.log(_SLOWEST), pairs)).repeat(2, 1))

    def forward(self, x: Tensor, context: Tensor, grid: Grid, other: Grid) -> Tensor:
        here, there = (places(size, x.device) for size in (grid, other))
        query, key, value = (
            split_heads(layer(tokens), self.num_heads)
            for layer, tokens in ((self.query, x), (self.key, context), (self.value, context))
        )
        mask = None
        if self.reach is not None:
            far = torch.cdist(here, there) > self.reach
            mask = torch.zeros_like(far, dtype=query.dtype).masked_fill(far, torch.finfo(query.dtype).min / 2)
        return self.out(merge_heads(attend(self.turned(query, here), self.turned(key, there), value, mask=mask)))

    def turned(self, tokens: Tensor, at: Tensor) -> Tensor:
        """``(B, heads, N, d)`` with the last 4 · pairs channels turned, two by two: rows first, then columns."""
        angles = (0.5 * math.pi * at[:, :, None] * self.frequencies.float()).flatten(1)  # N, 2 pairs
        turn = torch.polar(torch.ones_like(angles), angles)
        still, moved = tokens.split([tokens.shape[-1] - 2 * angles.shape[1], 2 * angles.shape[1]], dim=-1)
        pairs = torch.view_as_complex(moved.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([still, torch.view_as_real(pairs * turn).flatten(-2).to(tokens.dtype)], dim=-1)


def places(grid: Grid, device: Any) -> Tensor:
    """``(N, 2)``: row and column of every cell, from 0 at the first to 1 at the last."""
    rows, columns = (torch.linspace(0.0, 1.0, side, device=device) for side in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


@CONNECTORS.register("come_vl")
class ComeVlConnector(Connector):
    """Two encoders → ``(B, N / pool², L)``, N of the first; at the start the second adds nothing."""

    Config = ComeVlConfig
    config: ComeVlConfig

    def __init__(self, config: ComeVlConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        if width % (2 * config.num_heads) or width // config.num_heads < 6:
            raise ConfigError(
                f"connector come_vl: num_heads: {config.num_heads} heads of even width, 6 or more, do not divide the language model's "
                f"{width}"
            )
        self.first, self.second = encoders
        widths = {name: info.width // config.layers.get(name, 1) for name, info in encoders.items()}
        self.mixes = nn.ModuleDict({name: LayerMix(config.layers.get(name, 1), own) for name, own in widths.items()})
        self.mlp = GatedMlp(widths[self.second], config.expansion, config.dropout)
        pools = {name: WindowPool(own, config.pool_heads) for name, own in widths.items()} if config.pool > 1 else {}
        self.pools = nn.ModuleDict(pools)
        self.inputs = nn.ModuleDict({name: nn.Linear(own, width) for name, own in widths.items()})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in widths})
        self.attention = CrossEncoderAttention(width, config.num_heads, config.reach)
        self.gate = nn.Parameter(torch.zeros(1))
        self.reset_parameters()

    @classmethod
    def layout(cls, config: ComeVlConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        where = "connector come_vl"
        if len(encoders) != 2:
            raise ConfigError(f"{where}: mixes two encoders, and the model has {len(encoders)}")
        for name in config.layers:
            known_encoder(f"{where}.layers", name, encoders)
        for name, info in encoders.items():
            count = config.layers.get(name, 1)
            if count < 1 or info.width % count:
                raise ConfigError(
                    f"{where}: encoder {name!r} gives {info.width} channels, which are not {count} layers of one width; set "
                    f"model.connector.layers.{name} to the number of layers that model.encoders.{name}.layers names"
                )
            if config.pool > 1 and info.width // count % config.pool_heads:
                raise ConfigError(
                    f"{where}: pool_heads: {config.pool_heads} do not divide the width {info.width // count} of {name!r}"
                )
            if info.grid[0] % config.pool or info.grid[1] % config.pool:
                raise ConfigError(
                    f"{where}: encoder {name!r} has grid {shown(info.grid)}, which pool {config.pool} does not divide; give it another "
                    "image size, or set pool: 1"
                )
        rows, columns = (side // config.pool for side in next(iter(encoders.values())).grid)
        return ViewLayout(num_tokens=rows * columns, grid=(rows, columns))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=24)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(4, 6), width=16),
            "spatial": EncoderInfo(image=image, grid=(2, 4), width=12),
        }
        return (
            {
                "type": "come_vl",
                "layers": {"semantic": 2, "spatial": 3},
                "pool_heads": 2,
                "num_heads": 2,
                "dropout": 0.0,
            },
            encoders,
            16,
        )

    def output_layers(self) -> list[nn.Module]:
        return [self.norms[self.first]]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gate)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        tokens, grids = {}, {}
        for name, found in read_features(self.encoders, features, routing).items():
            mixed = self.mixes[name](found.unflatten(-1, (self.config.layers.get(name, 1), -1)))
            mixed = self.mlp(mixed) if name == self.second else mixed
            grids[name] = self._pooled_grid(name)
            tokens[name] = self.norms[name](self.inputs[name](self._pooled(name, mixed)))
        one, other = tokens[self.first], tokens[self.second]
        return one + self.gate.tanh() * self.attention(one, other, grids[self.first], grids[self.second])

    def _pooled_grid(self, name: str) -> Grid:
        rows, columns = self.encoders[name].grid
        return rows // self.config.pool, columns // self.config.pool

    def _pooled(self, name: str, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` → ``(B, N / pool², D)``."""
        if name not in self.pools:
            return tokens
        side = self.config.pool
        cells = tokens.unflatten(1, self.encoders[name].grid).unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return self.pools[name](cells.transpose(2, 3).flatten(3, 4)).flatten(1, 2)
