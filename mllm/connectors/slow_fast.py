"""How does a long video fit a short context: few fast tokens in the sequence, all slow ones read by gated cross-attention
(Slow-Fast, arXiv 2504.01328)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.build import connector_config
from mllm.connectors.layers import attend, merge_heads, shown
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, FastFrames, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures, VisualLayout


def fast_frames(count: int, stride: int, least: int) -> list[int]:
    """Every ``stride``-th of ``count`` frames, but at least ``least`` (all, where there are fewer)."""
    return FastFrames(stride=stride, least=least).sampled(count)


def fast_tokens(
    slow: Tensor, *, stride: int = 1, pool: int = 1, side: int = 1, least: int = 16, grid: Grid | None = None
) -> Tensor:
    """Slow tokens ``(T, n, C)`` of a video → fast ones ``(T' * n / side², C)``, frame by frame.

    stride: frames are sampled; pool: then averaged in time, so many together (adaptively to ``least`` where fewer would remain);
    side: cells along each side averaged in space; grid: (rows, columns) of the tokens of a frame, by default a square. Averages are taken
    in fp32.
    """
    kept = slow[torch.tensor(fast_frames(len(slow), stride, least), device=slow.device)]
    edge = round(kept.shape[1] ** 0.5)
    rows, columns = grid or (edge, edge)
    if rows * columns != kept.shape[1] or rows % side or columns % side:
        raise ValueError(
            f"{kept.shape[1]} tokens of a frame are no grid (a square, where none is given) that {side} divides"
        )
    volume = kept.float().transpose(1, 2).unflatten(2, (rows, columns))  # T C h w
    if pool > 1:
        frames = len(volume) // pool
        over_time = volume.permute(1, 2, 3, 0).flatten(0, 2)[:, None]
        if frames >= least:
            over_time = F.avg_pool1d(over_time, pool)
        else:
            over_time = F.adaptive_avg_pool1d(over_time, min(len(volume), least))
        volume = over_time[:, 0].unflatten(0, volume.shape[1:]).permute(3, 0, 1, 2)
    if side > 1:
        volume = F.avg_pool2d(volume, side)
    return volume.flatten(2).transpose(1, 2).flatten(0, 1).to(slow.dtype)


class SlowTokenAttention(nn.Module):
    """What a decoder layer adds to its self-attention so that text reads the slow tokens.

    The layer's own rotated queries ask; keys and values come from one projection whose rows are ordered (head, key | value,
    channel); a gate per token times one for the layer, which starts at zero, so that the language model starts unchanged.
    """

    def __init__(self, width: int, num_heads: int, num_key_value_heads: int, head_width: int | None = None):
        super().__init__()
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.head_width = width // num_heads if head_width is None else head_width
        self.key_value = nn.Linear(width, 2 * num_key_value_heads * self.head_width)
        self.token_gate = nn.Linear(num_heads * self.head_width, 1)
        self.layer_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.layer_gate)

    @torch.no_grad()
    def start_from(self, key: nn.Linear, value: nn.Linear) -> None:
        """Let keys and values begin as the language model's own, head by head. The published code stacks both projections, and so
        mixes heads; with a gate of zero neither does anything at first."""
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in (key, value)]
            target = getattr(self.key_value, name)
            if any(part is None for part in parts):
                target.zero_()
                continue
            heads = [part.unflatten(0, (self.num_key_value_heads, self.head_width)) for part in parts]
            target.copy_(torch.stack(heads, dim=1).flatten(0, 2))

    def pairs(self, slow: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slow tokens.

        Args:
            slow: ``(B, S, L)``, normed as the layer's input.

        Returns:
            Two of ``(B, key-value heads, S, d)``.
        """
        pairs = self.key_value(slow).view(*slow.shape[:2], self.num_key_value_heads, 2, self.head_width)
        key, value = pairs.transpose(1, 2).unbind(3)
        return key, value

    def forward(
        self,
        state: Tensor,
        query: Tensor,
        slow: Tensor | None,
        *,
        asks: Tensor,
        valid: Tensor,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Add what the slow tokens say.

        Args:
            state: ``(B, T, heads · d)``, the self-attention's output before its own projection.
            query: ``(B, T, heads, d)``, rotated.
            slow: ``(B, S, L)``, normed as the layer's input; None beside ``pairs``.
            asks: ``(B, T)`` bool, positions that are text.
            valid: bool, ``(B, S)`` slow tokens that are no padding, or ``(B, T, S)`` those that each position may read.
            pairs: what `pairs` gave before.

        Returns:
            ``(B, T, heads · d)``. A position without slow tokens stays as it is.
        """
        if pairs is None:
            assert slow is not None
            pairs = self.pairs(slow)
        often = self.num_heads // self.num_key_value_heads
        key, value = (part.repeat_interleave(often, dim=1) for part in pairs)
        mask = valid if valid.dim() == 3 else valid[:, None, :]
        sees = mask.any(dim=-1)
        mask = (mask | ~sees[..., None])[:, None]  # a row of nothing but padding would be NaN
        read = merge_heads(attend(query.transpose(1, 2), key, value, mask=mask))
        gate = torch.tanh(self.token_gate(state)) * torch.tanh(self.layer_gate)
        return state + gate * read * (asks & sees)[..., None].to(state.dtype)


class SlowFastConfig(ConnectorConfig):
    """Slow-Fast: pictures keep their tokens; of a video's frames ``cell`` × ``cell`` tokens are averaged to the slow ones, from which few
    fast ones are made for the sequence. The defaults are the released recipe's for 64 frames: 16 fast frames."""

    type: str = "slow_fast"
    each: dict[str, Any] = Field(default_factory=lambda: {"type": "mlp"})
    """The connector that every frame goes through first."""
    cell: int = Field(default=2, ge=1)
    stride: int = Field(default=1, ge=1)
    pool: int = Field(default=4, ge=1)
    side: int = Field(default=1, ge=1)
    least: int = Field(default=16, ge=1)
    every: int = Field(default=8, ge=1)

    @field_validator("each")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            connector_config(value, where="each")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def fast(self) -> FastFrames:
        """What of a video stands in the sequence."""
        return FastFrames.model_validate({name: getattr(self, name) for name in FastFrames.model_fields})


@CONNECTORS.register("slow_fast")
class SlowFastConnector(Connector):
    """Tokens of every frame → fast tokens of each video and, behind them, its slow ones ``(ΣM + ΣS, L)``; a picture's tokens are both."""

    Config = SlowFastConfig
    config: SlowFastConfig

    def __init__(self, config: SlowFastConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.grid = self.layout(config, encoders).grid
        inner = connector_config(config.each)
        self.each: Any = CONNECTORS.get(inner.type)(inner, encoders, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: SlowFastConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        inner = connector_config(config.each)
        view = CONNECTORS.get(inner.type).layout(inner, encoders)
        rows, columns = view.grid
        several = (
            view.shown > 1 or view.levels or view.beside or view.fast or view.joins_scales or view.joins_perspectives
        )
        if several or view.num_tokens != rows * columns:
            raise ConfigError(
                f"connector slow_fast: each: {inner.type} gives no plain map of one frame; use mlp, pixel_shuffle, average_pool or "
                "channel_concat"
            )
        cell = config.cell * config.side
        if rows % cell or columns % cell:
            raise ConfigError(
                f"connector slow_fast: a frame's map is {shown(view.grid)}, which cell {config.cell} times side {config.side} does not "
                "divide; change cell or side, or the encoder's image size"
            )
        return view.model_copy(update={"fast": config.fast})

    @classmethod
    def attention_from(cls, config: SlowFastConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, int]:
        inner = connector_config(config.each)
        return CONNECTORS.get(inner.type).attention_from(inner, encoders)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=16, width=24), grid=(4, 6), width=5)
        return {"type": "slow_fast", "least": 2}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return self.each.output_layers()

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        return self.each.view_tokens(features, routing, text)

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        tokens = self.view_tokens(features, routing, text)
        if layouts is None:
            return tokens.flatten(0, 1)
        parts = tokens.split([layout.num_views for layout in layouts])
        return torch.cat(
            [self._of_video(part) if at.num_slow else part.flatten(0, 1) for part, at in zip(parts, layouts)]
        )

    def _of_video(self, frames: Tensor) -> Tensor:
        """Tokens ``(T, M, L)`` of a video's frames → its fast tokens and then its slow ones ``(F + S, L)``."""
        fast, (rows, columns) = self.config.fast, self.grid
        if fast.cell > 1:
            maps = frames.transpose(1, 2).unflatten(2, (rows, columns)).float()
            frames = F.avg_pool2d(maps, fast.cell).flatten(2).transpose(1, 2).to(frames.dtype)
        grid = (rows // fast.cell, columns // fast.cell)
        few = fast_tokens(frames, stride=fast.stride, pool=fast.pool, side=fast.side, least=fast.least, grid=grid)
        return torch.cat([few, frames.flatten(0, 1)])
