"""What do CrossFormer and CrossFormer++ see: several scales in every token, near and far in turns (arXiv 2108.00154)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, Pyramid, PyramidEncoder, require_multiple
from mllm.encoders.backbones.layers import DepthwiseConv, Mlp, drop, drop_rates, init_linear
from mllm.encoders.base import EncoderConfig
from mllm.errors import ConfigError

Four = tuple[int, int, int, int]
_PATCH_KERNELS = (4, 8, 16, 32)
_MERGE_KERNELS = (2, 4)
_PADDED = -1e6


class CrossFormerConfig(BackboneConfig):
    """CrossFormer (defaults: CrossFormer-S) and CrossFormer++ (``cooling: true`` and group sizes of each stage, arXiv
    2303.06908)."""

    width: int = Field(default=96, ge=16)
    """C of the first stage; doubles from stage to stage."""
    depths: Four = (2, 2, 6, 2)
    num_heads: Four = (3, 6, 12, 24)
    group_size: Four = (7, 7, 7, 7)
    """Rows and columns of a group that attends together; a stage that is no larger is one group."""
    interval: Four = (8, 4, 2, 1)
    """Rows between two neighbours of a long-distance group."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    cooling: bool = False
    """A depthwise convolution and a norm, without residual, after every third block of a stage (++)."""


class PositionBias(nn.Module):
    """An MLP from the offset between two places of a group to one summand per head."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, num_heads)
        )

    def forward(self, size: int) -> Tensor:
        """``(heads, size², size²)`` for queries and keys of a group of ``size`` rows and columns."""
        weight = self.pos_proj.weight
        steps = torch.arange(1 - size, size, device=weight.device)
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(torch.cartesian_prod(steps, steps).to(weight.dtype)))))
        places = torch.arange(size, device=weight.device)
        apart = places[:, None] - places + size - 1  # of a query and a key
        index = apart[:, None, :, None] * (2 * size - 1) + apart[None, :, None, :]
        return table[index.flatten()].reshape(size**2, size**2, -1).permute(2, 0, 1)


def to_groups(x: Tensor, size: int, interval: int) -> Tensor:
    """``(B, rows, cols, C)`` → ``(B, groups, size², C)``; rows ``interval`` apart are neighbours in a group."""
    batch, _, cols, width = x.shape
    x = x.reshape(batch, -1, size, interval, cols // (size * interval), size, interval, width)
    return x.permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(batch, -1, size**2, width)


def from_groups(x: Tensor, size: int, interval: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_groups`; grid: rows and columns of the map."""
    tiles = (grid[0] // (size * interval), grid[1] // (size * interval))
    x = x.reshape(x.shape[0], tiles[0], interval, tiles[1], interval, size, size, x.shape[-1])
    return x.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(x.shape[0], *grid, x.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention inside groups: ``(B, groups, heads, size², head_dim)``, with ``(…, heads, size², size²)`` added to the scores.

    On a GPU in plain products: the fused kernel takes a mask in multiples of 8 keys, and a group has 49; with it the
    authors' modules, which multiply, were 1.4 times as fast (H200, bf16).
    """
    if q.is_cuda:
        return multiply(q, k, v, bias)
    mask = bias.expand(*q.shape[:3], *bias.shape[-2:]).flatten(0, 1)
    return F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in (q, k, v)), attn_mask=mask).view_as(q)


def multiply(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attend` in plain products."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v


class GroupAttention(nn.Module):
    """Attention inside groups of a map ``(B, rows, cols, C)``."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.pos = PositionBias(width // 16, num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, size: int, interval: int) -> Tensor:
        _, rows, cols, _ = x.shape
        multiple = size * interval
        down, right = -rows % multiple, -cols % multiple
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        grid = (rows + down, cols + right)
        q, k, v = (
            self.qkv(to_groups(x, size, interval)).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        )
        bias = self.pos(size).to(q.dtype)
        if down or right:
            bias = bias + self.padding(rows, cols, size, interval, q)
        y = attend(q, k, v, bias).transpose(2, 3).flatten(-2)
        y = from_groups(self.proj(y), size, interval, grid)
        return y[:, :rows, :cols]

    def padding(self, rows: int, cols: int, size: int, interval: int, like: Tensor) -> Tensor:
        """``(groups, 1, 1, size²)``: 0 for keys of the map, a very low number for padded ones."""
        multiple = size * interval
        low = max(_PADDED, torch.finfo(like.dtype).min / 2)
        padded = F.pad(like.new_zeros(1, rows, cols, 1), (0, 0, 0, -cols % multiple, 0, -rows % multiple), value=low)
        return to_groups(padded, size, interval)[0, :, None, None, :, 0]


class Block(nn.Module):
    """``(B, rows, cols, C)`` to the same shape. Even blocks look near, odd ones far."""

    def __init__(self, config: CrossFormerConfig, stage: int, index: int, rate: float):
        super().__init__()
        width = config.width << stage
        self.size, self.interval = config.group_size[stage], config.interval[stage] if index % 2 else 1
        self.norm1 = nn.LayerNorm(width)
        self.attn = GroupAttention(width, config.num_heads[stage])
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = drop(rate)
        self.cools = config.cooling and (index + 1) % 3 == 0 and index + 1 < config.depths[stage]
        if self.cools:
            self.ex_conv = DepthwiseConv(width, 3)
            self.ex_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = x.shape[1:3]
        size, interval = self.size, self.interval
        if min(rows, cols) <= size:  # one group, padded to a square
            size, interval = max(rows, cols), 1
        x = x + self.drop_path(self.attn(self.norm1(x), size, interval))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.ex_ln(self.ex_conv(x)) if self.cools else x


class PatchEmbed(nn.Module):
    """Pixels ``(B, 3, H, W)`` → ``(B, H / 4, W / 4, C)``: patches of four sizes around every fourth pixel."""

    def __init__(self, width: int):
        super().__init__()
        widths = (width // 2, width // 4, width // 8, width // 8)
        self.projs = nn.ModuleList(
            nn.Conv2d(3, out, kernel, stride=4, padding=(kernel - 4) // 2)
            for kernel, out in zip(_PATCH_KERNELS, widths)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(torch.cat([proj(pixels) for proj in self.projs], dim=1).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """``(B, rows, cols, C)`` → ``(B, rows / 2, cols / 2, 2 C)``."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reductions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, stride=2, padding=(kernel - 2) // 2) for kernel in _MERGE_KERNELS
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([conv(x) for conv in self.reductions], dim=1).permute(0, 2, 3, 1)


class CrossFormer(Pyramid):
    """Pixels to the maps of CrossFormer's stages, under the authors' names."""

    def __init__(self, config: CrossFormerConfig, num_stages: int, last_norm: bool):
        super().__init__()
        self.num_stages = num_stages
        self.patch_embed = PatchEmbed(config.width)
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.layers = nn.ModuleList()
        for stage in range(num_stages):
            blocks = nn.ModuleList(Block(config, stage, i, next(rates)) for i in range(config.depths[stage]))
            parts: dict[str, nn.Module] = {"blocks": blocks}
            if stage + 1 < num_stages:
                parts["downsample"] = Downsample(config.width << stage)
            self.layers.append(nn.ModuleDict(parts))
        self.norm = nn.LayerNorm(config.width << 3) if last_norm else None
        self.apply(init_linear)

    def entry(self, stage: int) -> nn.Module:
        return self.patch_embed if stage == 0 else self.layers[stage - 1]["downsample"]  # type: ignore[index]

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        return self.layers[stage]["blocks"]  # type: ignore[index]


class CrossFormerEncoder(PyramidEncoder):
    """CrossFormer and CrossFormer++ at any size that 32 divides, as in the authors' dense class: groups and position
    biases follow the map."""

    Config: ClassVar[type[EncoderConfig]] = CrossFormerConfig
    config: CrossFormerConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "crossformer",
            "width": 32,
            "depths": [2, 1, 4, 1],
            "num_heads": [1, 2, 2, 2],
            "group_size": [4, 4, 2, 2],
            "interval": [2, 2, 1, 1],
            "mlp_ratio": 1.0,
            "cooling": True,
            "image_size": [64, 96],
        }

    @classmethod
    def build(cls, config: CrossFormerConfig) -> CrossFormer:
        for stage, heads in enumerate(config.num_heads):
            if (config.width << stage) % heads:
                raise ConfigError(f"num_heads: {heads} of stage {stage} do not divide width {config.width << stage}")
        if config.width % 8:
            raise ConfigError(f"width: {config.width} is no multiple of 8, which its four patch sizes share")
        if config.info is not None:
            require_multiple(config.info.image, 32, "stages halve the map exactly")
        return CrossFormer(config, *cls.stages_needed(config))

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: CrossFormerConfig) -> dict[str, Tensor]:
        """Without the tables that older checkpoints of the authors store and that follow from the sizes."""
        return {k: v for k, v in state.items() if not k.endswith((".biases", ".relative_position_index"))}
