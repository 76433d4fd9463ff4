"""How do convolutions turn pixels into a feature map and back?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import StrictModel
from mllm.errors import ConfigError


class ConvolutionConfig(StrictModel):
    """Size of a convolutional encoder or decoder of the VQGAN family (arXiv 2012.09841)."""

    channels: int = Field(default=128, ge=1)
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each resolution, from the image's own to the lowest; each step halves the side."""
    num_res_blocks: int = Field(default=2, ge=1)
    """Of an encoder's level; a decoder's level has one more."""
    attention_levels: tuple[int, ...] | None = None
    """Levels (0: full resolution) with attention after each residual block; default: the lowest one only."""
    middle_attention: bool = True
    sampling: Literal["convolution", "shuffle"] = "convolution"
    """How the side is halved and doubled. convolution: strided, and nearest-neighbour then 3×3. shuffle: space to
    channels with a shortcut (DC-AE, arXiv 2410.10733)."""
    groups: int = Field(default=32, ge=1)
    """Groups of the group norms."""
    local: bool = False
    """Every code tells its own cell of pixels and nothing else: 1×1 kernels, and norms over the channels of each place. A change of the
    picture then changes the codes of the cells that it touches alone (in a norm over the whole picture it changes many others), so codes
    are easy to tell for a model that edits; cells do not blend, which a diffusion decoder may mend. Needs sampling: shuffle and no
    attention."""

    @model_validator(mode="after")
    def _in_cells(self) -> ConvolutionConfig:
        if self.local and (self.sampling != "shuffle" or self.middle_attention or self.attended):
            raise ValueError(
                "local: every code tells its own cell; set sampling: shuffle, attention_levels: [] and middle_attention: false"
            )
        return self

    @property
    def kernel(self) -> int:
        """Rows and columns of the kernels."""
        return 1 if self.local else 3

    @property
    def norm_groups(self) -> int:
        """``groups``, 0 for norms over the channels of each place."""
        return 0 if self.local else self.groups

    @property
    def factor(self) -> int:
        """Image side over feature side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def attended(self) -> tuple[int, ...]:
        return (len(self.multipliers) - 1,) if self.attention_levels is None else self.attention_levels


class Norm(nn.GroupNorm):
    """Group norm, eps 1e-6, that ignores a condition."""

    def __init__(self, channels: int, groups: int):
        if channels % groups:
            raise ConfigError(f"{channels} channels do not divide into {groups} norm groups; set groups to a divisor")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if x.device.type == "cpu" and not x.requires_grad:
            # torch 2.13 crashes in this norm's CPU backward for a channels-last input that needs no gradient.
            x = x.contiguous()
        return super().forward(x)


class PlaceNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of ``(B, C, H, W)``, eps 1e-6, that ignores a condition."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SpatialNorm(nn.Module):
    """``GroupNorm(x) * scale(c) + shift(c)``, the condition resized to x by nearest neighbour (MoVQ, arXiv
    2209.09002)."""

    def __init__(self, channels: int, groups: int, condition_channels: int):
        super().__init__()
        self.norm = make_norm(channels, groups, None)
        self.scale = nn.Conv2d(condition_channels, channels, 1)
        self.shift = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is not None
        condition = F.interpolate(condition, size=x.shape[-2:], mode="nearest")
        return self.norm(x) * self.scale(condition) + self.shift(condition)


def make_norm(channels: int, groups: int, condition_channels: int | None) -> nn.Module:
    """A plain norm, or a spatially conditioned one. groups: 0 for a norm over the channels of each place."""
    if condition_channels is not None:
        return SpatialNorm(channels, groups, condition_channels)
    return Norm(channels, groups) if groups else PlaceNorm(channels)


class ResidualBlock(nn.Module):
    """norm, swish, conv, twice, plus the input."""

    def __init__(
        self,
        inside: int,
        outside: int,
        groups: int = 32,
        condition: int | None = None,
        first_kernel: int = 3,
        kernel: int = 3,
    ):
        super().__init__()
        self.norm1 = make_norm(inside, groups, condition)
        self.conv1 = nn.Conv2d(inside, outside, first_kernel, padding=first_kernel // 2)
        self.norm2 = make_norm(outside, groups, condition)
        self.conv2 = nn.Conv2d(outside, outside, kernel, padding=kernel // 2)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map."""

    def __init__(self, channels: int, groups: int = 32, condition: int | None = None):
        super().__init__()
        self.norm = make_norm(channels, groups, condition)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm(x, condition)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.out(h)


class StridedDown(nn.Module):
    """Halves the side: zeros on the right and below, then a strided 3×3 convolution."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class NearestUp(nn.Module):
    """Doubles the side: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def space_to_channels(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` → ``(B, 4C, H/2, W/2)``; torch's own pixel_unshuffle gives an empty batch a wrong shape."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


class ShuffleDown(nn.Module):
    """Halves the side by moving 2×2 cells into channels; the shortcut averages neighbouring channels of the moved
    input."""

    def __init__(self, inside: int, outside: int, kernel: int = 3):
        super().__init__()
        if outside % 4 or (4 * inside) % outside:
            raise ConfigError(
                f"shuffle sampling needs 4·{inside} channels to be a multiple of {outside}, itself one of 4"
            )
        self.conv = nn.Conv2d(inside, outside // 4, kernel, padding=kernel // 2)
        self.group = 4 * inside // outside

    def forward(self, x: Tensor) -> Tensor:
        shortcut = space_to_channels(x)
        shortcut = shortcut.unflatten(1, (shortcut.shape[1] // self.group, self.group)).mean(2)
        return space_to_channels(self.conv(x)) + shortcut


class ShuffleUp(nn.Module):
    """Doubles the side by moving channels into 2×2 cells; the shortcut repeats each channel."""

    def __init__(self, inside: int, outside: int, kernel: int = 3):
        super().__init__()
        if (4 * outside) % inside:
            raise ConfigError(f"shuffle sampling needs 4·{outside} channels to be a multiple of {inside}")
        self.conv = nn.Conv2d(inside, 4 * outside, kernel, padding=kernel // 2)
        self.repeats = 4 * outside // inside

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)
        return F.pixel_shuffle(self.conv(x), 2) + shortcut


class _Level(nn.Module):
    """Residual blocks of one resolution, with attention after each where asked for, then a change of side."""

    def __init__(self, blocks: Sequence[nn.Module], attention: Sequence[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(blocks), nn.ModuleList(attention)
        self.resample = resample

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, condition)
            if len(self.attention):
                x = self.attention[index](x, condition)
        return x if self.resample is None else self.resample(x)


def _level(
    config: ConvolutionConfig, number: int, inside: int, outside: int, attend: bool, condition: int | None
) -> tuple[list[nn.Module], list[nn.Module]]:
    attention = [AttentionBlock(outside, config.groups, condition) for _ in range(number)] if attend else []
    return [_block(config, outside if i else inside, outside, condition) for i in range(number)], list(attention)


def _block(config: ConvolutionConfig, inside: int, outside: int, condition: int | None) -> nn.Module:
    return ResidualBlock(inside, outside, config.norm_groups, condition, config.kernel, config.kernel)


def _convolution(config: ConvolutionConfig, inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, config.kernel, padding=config.kernel // 2)


def _shuffled(config: ConvolutionConfig, plain: type[nn.Module], shuffle: type[nn.Module], width: int) -> nn.Module:
    return plain(width, width) if config.sampling == "convolution" else shuffle(width, width, config.kernel)


class _Middle(nn.Module):
    def __init__(self, config: ConvolutionConfig, channels: int, condition: int | None):
        super().__init__()
        self.block1 = _block(config, channels, channels, condition)
        self.attention = AttentionBlock(channels, config.groups, condition) if config.middle_attention else None
        self.block2 = _block(config, channels, channels, condition)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.block1(x, condition)
        if self.attention is not None:
            x = self.attention(x, condition)
        return self.block2(x, condition)


class ConvolutionalEncoder(nn.Module):
    """Pixels ``(B, 3, H, W)`` → ``(B, out_channels, H/factor, W/factor)``."""

    def __init__(self, config: ConvolutionConfig, out_channels: int, *, in_channels: int = 3):
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = _convolution(config, in_channels, config.channels)
        levels, width = [], config.channels
        for level, outside in enumerate(widths):
            blocks, attention = _level(config, config.num_res_blocks, width, outside, level in config.attended, None)
            last = level == len(widths) - 1
            down = None if last else _shuffled(config, StridedDown, ShuffleDown, outside)
            levels.append(_Level(blocks, attention, down))
            width = outside
        self.levels = nn.ModuleList(levels)
        self.middle = _Middle(config, width, None)
        self.norm_out = make_norm(width, config.norm_groups, None)
        self.conv_out = _convolution(config, width, out_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] % self.config.factor or pixels.shape[-2] % self.config.factor:
            raise ConfigError(
                f"image {tuple(pixels.shape[-2:])} is not a multiple of {self.config.factor} on both sides"
            )
        x = self.conv_in(pixels)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class ConvolutionalDecoder(nn.Module):
    """``(B, in_channels, h, w)`` → pixels ``(B, 3, h·factor, w·factor)``, no output activation.

    condition_channels: every norm is a `SpatialNorm` on a second map (the codes' vectors).
    """

    def __init__(
        self,
        config: ConvolutionConfig,
        in_channels: int,
        *,
        out_channels: int = 3,
        condition_channels: int | None = None,
    ):
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        width = widths[-1]
        self.conv_in = _convolution(config, in_channels, width)
        self.middle = _Middle(config, width, condition_channels)
        levels = []
        for level in reversed(range(len(widths))):
            outside = widths[level]
            number = config.num_res_blocks + 1
            blocks, attention = _level(config, number, width, outside, level in config.attended, condition_channels)
            up = _shuffled(config, NearestUp, ShuffleUp, outside) if level else None
            levels.append(_Level(blocks, attention, up))
            width = outside
        self.levels = nn.ModuleList(levels)
        """From the lowest resolution to the highest."""
        self.norm_out = make_norm(width, config.norm_groups, condition_channels)
        self.conv_out = _convolution(config, width, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.middle(self.conv_in(x), condition)
        for level in self.levels:
            x = level(x, condition)
        return self.conv_out(F.silu(self.norm_out(x, condition)))
