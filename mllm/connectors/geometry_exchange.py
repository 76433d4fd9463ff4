"""How do a panorama and its views tell each other what they see, knowing where each looks (Imagine360, arXiv 2412.03552)?

Written from a description of 3DTopia/Imagine360 (Apache-2.0) and checked by its numbers. There the block stands between two denoisers; its
second, unused attention and its masks drawn at random in evaluation are not here: which masks hold is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.layers import attend, merge_heads, read_features, single, split_heads
from mllm.connectors.multi_scale import MultiScaleConfig, MultiScaleConnector
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures

HEAD = 32
"""Channels of a head."""
PUBLISHED_WIDTH = 320
"""The widest map whose published code is a plain row of octaves; what wider ones do is not written down."""
BOUNDED_OCTAVES = 6
"""The shortest wave of the bounded code is 360° / 32, about a cell of a panorama 32 cells wide."""

PositionCode = Literal["bounded", "published"]


def angle_code(angles: Tensor, width: int, kind: PositionCode = "bounded") -> Tensor:
    """Longitude and latitude ``(…, 2)`` in radians → ``(…, width)``: sines of both at growing frequencies, then cosines.

    published: every octave up to ``2^(width / 4 - 1)``; at a width of 320 that is beyond what fp32 can tell apart, a code of rounding
    that another machine does not give. bounded (ours): as many frequencies, spread over the first `BOUNDED_OCTAVES` octaves.
    """
    count = width // 4
    steps = torch.arange(count, dtype=torch.float32, device=angles.device)
    powers = steps if kind == "published" else steps * ((BOUNDED_OCTAVES - 1) / max(1, count - 1))
    waves = (angles.float()[..., None] * 2.0**powers).flatten(-2)
    return torch.cat([waves.sin(), waves.cos()], -1)


class GeometryExchange(nn.Module):
    """A whole and its views read each other by one block of cross attention, the same weights both ways; at the start it changes nothing.

    Queries and keys know their angles; the bias is added to the scores and shuts nothing out. Both ways read the maps as they came.
    """

    def __init__(self, width: int, *, code: PositionCode = "bounded", expand: int = 4):
        super().__init__()
        if width % HEAD:
            raise ConfigError(f"geometry exchange: width {width} is no multiple of {HEAD}, the width of a head")
        if code == "published" and width > PUBLISHED_WIDTH:
            raise ConfigError(
                f"geometry exchange: the published code ends at width {PUBLISHED_WIDTH}, got {width}; use bounded"
            )
        self.width, self.num_heads = width, width // HEAD
        self.code: PositionCode = code
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in, self.ffn_out = nn.Linear(width, 2 * expand * width), nn.Linear(expand * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The linear layers that give a result start at zero."""
        for layer in (self.out, self.ffn_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        whole: Tensor,
        views: Tensor,
        angles: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Both, exchanged, in the same shapes.

        Args:
            whole: ``(B, M, C)``, the panorama's map in raster order; frames of a video are folded into B.
            views: ``(B, V, N, C)``.
            angles: of the whole ``([B,] M, 2)`` and of the views ``([B,] V, N, 2)``: longitude and latitude in radians. With a batch axis,
                every sample has its own cameras (the original takes those of the first for all).
            biases: what the whole adds to its scores over the views ``([B,] M, V * N)``, and the views over the whole ``([B,] V * N, M)``.
        """
        flat = views.flatten(1, 2)
        code_whole = angle_code(angles[0], self.width, self.code).to(whole.dtype)
        code_views = angle_code(angles[1], self.width, self.code).flatten(-3, -2).to(views.dtype)
        seen_whole, seen_views = self.norm(whole + code_whole), self.norm(flat + code_views)
        new_whole = self._read(whole, seen_whole, seen_views, biases[0])
        new_views = self._read(flat, seen_views, seen_whole, biases[1])
        return new_whole, new_views.view_as(views)

    def _read(self, x: Tensor, asking: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        heads = [
            split_heads(part, self.num_heads) for part in (self.query(asking), self.key(context), self.value(context))
        ]
        bias = (bias if bias.dim() == 3 else bias[None])[:, None].to(x.dtype)
        x = x + self.out(merge_heads(attend(heads[0], heads[1], heads[2], mask=bias)))
        value, gate = self.ffn_in(self.ffn_norm(x)).chunk(2, -1)
        return x + self.ffn_out(value * F.gelu(gate))


def box_angles(grid: Grid, box: tuple[float, float, float, float], field: tuple[float, float]) -> Tensor:
    """Longitude and latitude ``(rows * cols, 2)`` in radians of the cells of a part of a panorama.

    Args:
        grid: rows and columns of the part's map.
        box: left, top, right, bottom of the part, as shares of the panorama.
        field: degrees that the panorama shows across and down; its middle is straight ahead.
    """
    left, top, right, bottom = box
    down, across = ((torch.arange(n, dtype=torch.float32) + 0.5) / n for n in grid)
    latitude = (0.5 - (top + down * (bottom - top))) * math.radians(field[1])
    longitude = (left + across * (right - left) - 0.5) * math.radians(field[0])
    return torch.stack([longitude[None, :].expand(grid), latitude[:, None].expand(grid)], -1).flatten(0, 1)


def angle_bias(asking: Tensor, answering: Tensor, sigma: float, *, opposite: bool = False) -> Tensor:
    """Angles ``(M, 2)`` and ``(N, 2)`` → ``(M, N)`` in [-1, 1]: 1 where a query finds its nearest direction, -1 far off.

    sigma: of the bell over the angle between them, in radians. opposite: the direction straight behind counts as the query's own. The
    published bias blurs a rendered mask of what both see; this one (ours) needs no cameras but the angles.
    """
    ahead, there = _directions(asking), _directions(answering)
    cosine = (ahead @ (-there if opposite else there).T).clamp(-1, 1)
    bell = torch.exp(-0.5 * (torch.acos(cosine) / sigma).square())
    return 2 * bell / bell.amax(1, keepdim=True).clamp_min(torch.finfo(bell.dtype).tiny) - 1


def _directions(angles: Tensor) -> Tensor:
    longitude, latitude = angles.unbind(-1)
    flat = latitude.cos()
    return torch.stack([flat * longitude.cos(), flat * longitude.sin(), latitude.sin()], -1)


class GeometryExchangeConfig(MultiScaleConfig):
    """A panorama (equirectangular: longitude across, latitude down) seen whole and in crops, for ``views: {type: multi_scale}`` of the same
    scales: whole and crops read each other before S2 makes one map of them, so it gives as many tokens as one view has."""

    type: str = "geometry_exchange"
    field: tuple[float, float] = (360.0, 180.0)
    """Degrees that a picture shows across and down."""
    code: PositionCode = "bounded"
    """published: only to compare with Imagine360's block; see `angle_code`."""
    opposite: bool = False
    """Look for what lies straight behind, as Imagine360's antipodal masks."""
    reach: float = Field(default=1.5, gt=0)
    """Sigma of the bias, in cells of the whole."""


@CONNECTORS.register("geometry_exchange")
class GeometryExchangeConnector(MultiScaleConnector):
    """One encoder: a panorama and its crops → ``(M, L)``, M of one view. A view by itself is its own only crop."""

    Config = GeometryExchangeConfig
    config: GeometryExchangeConfig

    def __init__(self, config: GeometryExchangeConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.exchange = GeometryExchange(self.encoders[self.encoder].width, code=config.code)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: GeometryExchangeConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        where = "connector geometry_exchange"
        info = encoders[single(where, encoders)]
        if config.scales[0] != 1 or len(config.scales) < 2:
            raise ConfigError(
                f"{where}: scales are 1 (the whole) and at least one more, e.g. [1, 2]; got {config.scales}"
            )
        if info.width % HEAD:
            raise ConfigError(
                f"{where}: the encoder's width {info.width} is no multiple of {HEAD}, the width of a head"
            )
        if not (0 < config.field[0] <= 360 and 0 < config.field[1] <= 180):
            raise ConfigError(f"{where}: field is degrees across (up to 360) and down (up to 180), got {config.field}")
        return ViewLayout(num_tokens=info.grid[0] * info.grid[1], grid=info.grid, joins_scales=tuple(config.scales))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=8, width=12), grid=(2, 3), width=32)
        return {"type": "geometry_exchange"}, {"vision": info}, 8

    def merged(self, views: Tensor) -> Tensor:
        """The whole and the crops of all other scales ``(B, Σs², N, D)`` → ``(B, N, scales · D)``."""
        whole, crops = self._exchanged(views, self._boxes())
        return super().merged(torch.cat([whole[:, None], crops], 1))

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        whole, crops = self._exchanged(torch.stack([tokens, tokens], 1), [(0.0, 0.0, 1.0, 1.0)])
        return self.projector(torch.cat([whole, crops[:, 0].repeat(1, 1, len(self.config.scales) - 1)], -1))

    def _boxes(self) -> list[tuple[float, float, float, float]]:
        return [
            (column / scale, row / scale, (column + 1) / scale, (row + 1) / scale)
            for scale in self.config.scales[1:]
            for row in range(scale)
            for column in range(scale)
        ]

    def _exchanged(self, views: Tensor, boxes: list[tuple[float, float, float, float]]) -> tuple[Tensor, Tensor]:
        config, grid = self.config, self.encoders[self.encoder].grid
        whole = box_angles(grid, (0.0, 0.0, 1.0, 1.0), config.field)
        crops = torch.stack([box_angles(grid, box, config.field) for box in boxes])
        sigma = config.reach * math.radians(max(config.field[0] / grid[1], config.field[1] / grid[0]))
        flat = crops.flatten(0, 1)
        biases = tuple(
            angle_bias(a, b, sigma, opposite=config.opposite).to(views.device)
            for a, b in ((whole, flat), (flat, whole))
        )
        return self.exchange(
            views[:, 0], views[:, 1:], (whole.to(views.device), crops.to(views.device)), (biases[0], biases[1])
        )
