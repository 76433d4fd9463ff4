"""What does SAM see with pyramids of convolutions beside it, weighed against it position by position (DB-SAM, arXiv 2410.04172)?"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from mllm.encoders.backbones.layers import IMAGENET, Mlp, drop, run
from mllm.encoders.backbones.samtrunk import SamSidedEncoder, SamTrunkConfig, enter, sam_trunk, see
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, map_to_tokens
from mllm.errors import ConfigError
from mllm.fusions import ChannelAttentionConv, GateFusion, SoftmaxFusion
from mllm.types import Grid, ImageSpec

_LOOKS = 1 << 26
"""Cells that are read at once, which bounds the memory of an exchange: as many pictures as that is good for."""


class DbSamConfig(SamTrunkConfig):
    """DB-SAM's image encoder. Defaults are the published configuration: four pyramids, exchanges after the global blocks, softmax."""

    branches: int = Field(default=4, ge=1)
    """Pyramids of convolutions; the k-th sees the picture at 1 / 2^k, and all end on SAM's grid."""
    stem: tuple[int, int, int] = (128, 256, 512)
    """Channels of a pyramid's three 3 × 3 convolutions."""
    exchange: Literal["deformable", "none"] = "deformable"
    """deformable: after each global block two layers of deformable attention over SAM's map and the pyramids'. The authors' file is
    missing from their repository; this one follows Deformable DETR (arXiv 2010.04159) with one grid for all levels."""
    exchange_points: int = Field(default=4, ge=1)
    exchange_ratio: float = Field(default=0.25, gt=0)
    """Of the exchange's MLPs."""
    channel_attention: bool = False
    """A convolution with squeeze-excite after each of SAM's blocks, as the paper describes; the published configuration has none."""
    fusion: Literal["softmax", "gate"] = "softmax"
    """gate: the paper's two branches; set ``branches: 1``."""
    reduction: int = Field(default=16, ge=1)
    expand: float = Field(default=4.0, gt=0)


class Pyramid(nn.Module):
    """The picture at 1 / 2^number through three convolutions, of which as many halve as it takes → ``(B, C, rows, cols)``."""

    def __init__(self, config: DbSamConfig, number: int):
        super().__init__()
        self.scale = 2**number
        halvings = (config.patch_size // self.scale).bit_length() - 1
        widths = (3, *config.stem)
        layers: list[nn.Module] = []
        for k in range(3):
            layers.append(
                nn.Conv2d(widths[k], widths[k + 1], 3, stride=2 if k < halvings else 1, padding=1, bias=False)
            )
            layers += [LayerNorm2d(widths[k + 1], eps=1e-6), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Conv2d(widths[-1], config.width, 1), LayerNorm2d(config.width, eps=1e-6))

    def forward(self, pixels: Tensor) -> Tensor:
        size = (pixels.shape[2] // self.scale, pixels.shape[3] // self.scale)
        small = F.interpolate(pixels.float(), size, mode="bilinear", align_corners=False).to(pixels.dtype)
        return self.out(self.convolutions(small))


class DeformableLayer(nn.Module):
    """Every position of every map looks at a few places of all maps, and thinks: ``(B, L, rows, cols, C)`` to the same."""

    def __init__(self, config: DbSamConfig, levels: int):
        super().__init__()
        width, self.heads, self.levels, self.points = config.width, config.num_heads, levels, config.exchange_points
        count = self.heads * levels * self.points
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.offsets, self.shares = nn.Linear(width, 2 * count), nn.Linear(width, count)
        self.values, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = Mlp(width, max(int(width * config.exchange_ratio), 1))
        self.drop_path = drop(config.drop_path)
        nn.init.zeros_(self.offsets.weight)
        turn = torch.arange(self.heads) * (2 * torch.pi / self.heads)
        away = torch.stack([turn.cos(), turn.sin()], -1)
        away = away / away.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        start = away[:, None, None] * steps[None, None, :, None]
        self.offsets.bias = nn.Parameter(start.expand(-1, levels, -1, -1).flatten().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.look(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def look(self, x: Tensor) -> Tensor:
        levels, rows, cols = x.shape[1:4]
        flat = x.flatten(1, 3)
        values = self.values(flat).unflatten(-1, (self.heads, -1))
        each = 4 * self.points * self.heads * levels * flat.shape[1]
        parts = max(1, _LOOKS // each)
        found = [self.gather(*part, (rows, cols)) for part in zip(flat.split(parts), values.split(parts))]
        return self.out(torch.cat(found)).view_as(x)

    def gather(self, flat: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """What positions ``(B, N, C)`` see of the values ``(B, N, heads, D)`` → ``(B, N, C)``. Each place is four cells with their shares;
        all of a position's are summed as they are read, so that nothing as wide as the values is written for every place."""
        batch, count, heads, width = values.shape
        rows, shares = (part.flatten(3).flatten(0, 2) for part in self.places(flat, grid))
        table = values.reshape(-1, width)
        found = F.embedding_bag(rows, table, per_sample_weights=shares.to(table.dtype), mode="sum")
        return found.view(batch, count, heads * width)

    def places(self, flat: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Where each of N positions ``(B, N, C)`` looks: the four cells around each place, as rows of the values ``(B * N * heads, D)``,
        int32 ``(B, N, heads, L, points, 4)``, and what of each it takes, fp32; outside the grid there is nothing to take."""
        parts = (self.heads, self.levels, self.points)
        offsets = self.offsets(flat).unflatten(-1, (*parts, 2)).float()
        shares = self.shares(flat).unflatten(-1, (self.heads, -1)).float().softmax(-1).unflatten(-1, parts[1:])
        count = grid[0] * grid[1]
        own = torch.arange(count, device=flat.device).repeat(self.levels)[:, None, None, None]
        down = neighbours(offsets[..., 1] + own // grid[1], grid[0])
        across = neighbours(offsets[..., 0] + own % grid[1], grid[1])
        batch, head, level = (
            torch.arange(n, device=flat.device, dtype=torch.int32) for n in (len(flat), self.heads, self.levels)
        )
        first = (batch * self.levels)[:, None, None, None, None] + level[:, None]
        first = first * (count * self.heads) + head[:, None, None]
        lines = [(cell * (grid[1] * self.heads) + first, share * shares) for cell, share in down]
        steps = [(cell * self.heads, share) for cell, share in across]
        rows = torch.stack([line + step for line, _ in lines for step, _ in steps], -1)
        return rows, torch.stack([tall * wide for _, tall in lines for _, wide in steps], -1)


def neighbours(places: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The cells before and after places between them, int32 of the same shape, and the share of each: none for cells outside."""
    before = places.floor()
    rest = places - before
    pairs = ((before, 1 - rest), (before + 1, rest))
    inside = [(cell >= 0) & (cell < size) for cell, _ in pairs]
    return [(torch.where(here, cell, 0).int(), share * here) for here, (cell, share) in zip(inside, pairs)]


class Exchange(nn.Module):
    """Two deformable layers over SAM's map and the pyramids', told apart by a summand each, zero at the start."""

    def __init__(self, config: DbSamConfig):
        super().__init__()
        levels = config.branches + 1
        self.level = nn.Parameter(torch.zeros(levels, 1, 1, config.width))
        self.layers = nn.ModuleList(DeformableLayer(config, levels) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps + self.level
        for layer in self.layers:
            maps = layer(maps)
        return maps


class DbSam(nn.Module):
    """Pixels to one map ``(B, rows, cols, C)``, through SAM's neck where there is one."""

    recompute = False

    def __init__(self, config: DbSamConfig):
        super().__init__()
        self.has_neck = config.final_norm
        self.vit = sam_trunk(config, depth=config.depth, neck=self.has_neck)
        self.pyramids = nn.ModuleList(Pyramid(config, k + 1) for k in range(config.branches))
        exchanges = {str(i): Exchange(config) for i in config.global_blocks} if config.exchange != "none" else {}
        self.exchanges = nn.ModuleDict(exchanges)
        attended = range(config.depth) if config.channel_attention else ()
        self.channel_attention = nn.ModuleList(ChannelAttentionConv(config.width) for _ in attended)
        if config.fusion == "gate":
            self.fusion: nn.Module = GateFusion(config.width, config.reduction, config.expand)
        else:
            self.fusion = SoftmaxFusion(config.width, config.branches, config.reduction, config.expand)

    def forward(self, pixels: Tensor) -> Tensor:
        x = enter(self.vit, pixels)
        convolved = [pyramid(pixels).permute(0, 2, 3, 1) for pyramid in self.pyramids]
        for number, layer in enumerate(self.vit.layers):
            x = run(see, layer, x, recompute=self.recompute)
            if self.channel_attention:
                x = run(self.channel_attention[number], x.permute(0, 3, 1, 2), recompute=self.recompute)
                x = x.permute(0, 2, 3, 1)
            if str(number) in self.exchanges:
                maps = torch.stack([x, *convolved], 1)
                x, *convolved = run(self.exchanges[str(number)], maps, recompute=self.recompute).unbind(1)
        x = self.fusion(x, convolved)
        return self.vit.neck(x).permute(0, 2, 3, 1) if self.has_neck else x


class DbSamEncoder(SamSidedEncoder):
    """One map: SAM's and the convolutions' weighed against one another, after SAM's neck with ``final_norm``."""

    Config: ClassVar[type[EncoderConfig]] = DbSamConfig
    config: DbSamConfig
    model: DbSam

    @classmethod
    def default_image(cls, config: DbSamConfig) -> ImageSpec:
        return ImageSpec(height=1024, width=1024, **IMAGENET)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "dbsam",
            "width": 32,
            "depth": 3,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": 8,
            "window_size": 3,
            "global_blocks": [1, 2],
            "neck_width": 16,
            "trained_size": 32,
            "branches": 3,
            "stem": [8, 8, 8],
            "reduction": 4,
            "channel_attention": True,
            "image_size": [32, 48],
        }

    @classmethod
    def build(cls, config: DbSamConfig) -> DbSam:
        if config.layers != [-1]:
            raise ConfigError("layers: this encoder hands out one map, fused at the end; layers is [-1]")
        if 2**config.branches > config.patch_size or config.patch_size // 2 > 8:
            most = min(config.patch_size.bit_length() - 1, 4)
            raise ConfigError(
                f"branches: {config.branches} with patch_size {config.patch_size}; the k-th pyramid sees 1 / 2^k of the picture and "
                f"halves up to three times, so at most {most} branches and patches of at most 16"
            )
        if config.fusion == "gate" and config.branches != 1:
            raise ConfigError(f"fusion: gate joins two branches; set branches: 1 (it is {config.branches})")
        if config.width % config.reduction:
            raise ConfigError(f"reduction: {config.reduction} does not divide width {config.width}")
        cls.fits(config)
        return DbSam(config)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        return [map_to_tokens(self.model(pixels).permute(0, 3, 1, 2))]

    def entries(self) -> list[str]:
        return ["model.pyramids."]

    def beside(self, block: int) -> list[str]:
        return [f"model.exchanges.{block}.", f"model.channel_attention.{block}."]

    def ends(self) -> list[str]:
        return ["model.fusion."]
