"""What do encoder-free models see: patches made into tokens by a layer or two that learn with the language model (EVE)?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.encoders.library import ImageEncoderConfig, check_patches, check_pixels
from mllm.encoders.weights import load_exactly, local_path, read_weights, strip_prefix
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.types import EncoderInfo, Grid, ImageSpec, VisionFeatures

_CLIP: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


class EveConfig(ImageEncoderConfig):
    """EVE's patch embedding layer (arXiv 2406.11832); made for ``views: {type: native, rule: eve}`` and connector mlp."""

    width: int = Field(default=1024, gt=0)
    patch_size: int = Field(default=14, gt=0)
    stride: int = Field(default=2, gt=0)
    """stride × stride patches become one token."""
    num_heads: int = Field(default=8, gt=0)


class PatchConvConfig(ImageEncoderConfig):
    """One convolution per patch and a GELU: the first half of EVEv2's patch embedding (arXiv 2502.06788), whose second half is
    connector ``{type: pixel_shuffle, factor: 2, projector: {depth: 1}}``."""

    width: int = Field(default=1024, gt=0)
    patch_size: int = Field(default=16, gt=0)
    bias: bool = True
    gelu: bool = True


def _split(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


class WindowAttention(nn.Module):
    """Queries ``(…, Q, C)`` read ``(…, N, C)``: norms before the projections, the scale is that of the whole width, and what is
    read is added to the query itself."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, width**-0.5
        self.q = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.kv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        key, value = self.kv(context).chunk(2, dim=-1)
        q, k, v = (_split(part, self.num_heads) for part in (self.q(x), key, value))
        read = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x + self.proj(read.transpose(-2, -3).flatten(-2))


class LocalAttention(WindowAttention):
    """The mean of each stride × stride window asks the window: ``(B, C, H, W)`` → ``(B, H · W / stride², C)``."""

    def __init__(self, width: int, stride: int, num_heads: int):
        super().__init__(width, num_heads)
        self.stride = stride

    def forward(self, maps: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        cells = maps.unflatten(3, (-1, self.stride)).unflatten(2, (-1, self.stride))  # B, C, h, s, w, s
        windows = cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        return self.of_windows(windows)

    def of_windows(self, windows: Tensor) -> Tensor:
        """``(…, s², C)`` → ``(…, C)``."""
        return super().forward(windows.mean(dim=-2, keepdim=True), windows).squeeze(-2)


class GlobalAttention(WindowAttention):
    """A class token ``(1, 1, C)`` asks all patches ``(B, N, C)`` → ``(B, 1, C)``."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x.expand(len(context), -1, -1), context)


class PatchEmbeddingLayer(nn.Module):
    """Pixels to EVE's sequences: class token, then row after row of the map, each with the split token behind it."""

    def __init__(self, width: int, patch_size: int, stride: int = 2, num_heads: int = 8):
        super().__init__()
        self.patch_size, self.stride, self.width = patch_size, stride, width
        self.class_embedding = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.split_embedding = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.local_attention = LocalAttention(width, stride, num_heads)
        self.global_attention = GlobalAttention(width, num_heads)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, 1 + h (w + 1), C)``."""
        unit = self.patch_size * self.stride
        grid = (pixels.shape[2] // unit, pixels.shape[3] // unit)
        return self.sequence(self.local_attention(self.patch_embedding(pixels)), grid)

    def of_patches(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Squares ``(ΣN, 3 p²)`` of ``stride × stride`` patches of images with these grids → ``(Σ(1 + h (w + 1)), C)``."""
        unit = self.patch_size * self.stride
        maps = self.patch_embedding(patches.view(-1, 3, unit, unit))  # N, C, s, s
        tokens = self.local_attention.of_windows(maps.flatten(2).transpose(1, 2))
        parts = tokens.split([rows * columns for rows, columns in grids])
        return torch.cat([self.sequence(part[None], grid)[0] for part, grid in zip(parts, grids, strict=True)])

    def of_canvas(self, pixels: Tensor) -> tuple[list[Tensor], list[Grid]]:
        """``(B, 4, H, W)`` as the authors pass it, the fourth channel 1 where there is picture → the sequence and (h, w) of each."""
        found, grids = [], []
        unit = self.patch_size * self.stride
        for image in pixels:
            rows, columns = (image[3] > 0).any(dim=1).nonzero()[:, 0], (image[3] > 0).any(dim=0).nonzero()[:, 0]
            inside = image[None, :3, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            found.append(self(inside)[0])
            grids.append((inside.shape[2] // unit, inside.shape[3] // unit))
        return found, grids

    def sequence(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Map ``(B, h w, C)`` → ``(B, 1 + h (w + 1), C)``."""
        leading = self.global_attention(self.class_embedding.view(1, 1, -1), tokens)
        rows = tokens.unflatten(1, grid)
        ends = self.split_embedding.expand(len(tokens), grid[0], 1, -1)
        return torch.cat([leading, torch.cat([rows, ends], dim=2).flatten(1, 2)], dim=1)


PatchLayerConfig = EveConfig | PatchConvConfig


class _PatchEncoder(VisionEncoder):
    """An encoder of one or two layers that learns with the language model."""

    config: PatchLayerConfig
    layer: nn.Module

    def __init__(self, config: PatchLayerConfig):
        super().__init__(config if config.info is not None else self.resolve(config))

    @classmethod
    def unit(cls, config: PatchLayerConfig) -> int:
        """Pixels of one token's side."""
        return config.patch_size

    @classmethod
    def resolve(cls, config: PatchLayerConfig) -> Any:
        unit = cls.unit(config)
        side = unit * (672 // unit)
        image = config.image(ImageSpec(height=side, width=side, patch=unit, **_CLIP))
        if image.height % unit or image.width % unit:
            raise ConfigError(
                f"image_size: ({image.height}, {image.width}) is no multiple of {unit}, the side of a token"
            )
        if config.layers != [-1]:
            raise ConfigError(f"layers: {config.type} has no blocks, so layers stays [-1] (got {config.layers})")
        if config.keep_prefix:
            raise ConfigError(f"keep_prefix: {config.type} has no prefix tokens; remove the key")
        return config.model_copy(update={"info": cls.sizes(config, image, (image.height // unit, image.width // unit))})

    @classmethod
    def sizes(cls, config: PatchLayerConfig, image: ImageSpec, grid: Grid) -> EncoderInfo:
        return EncoderInfo(image=image, grid=grid, width=config.width)

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        return_attention: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> VisionFeatures:
        if return_attention:
            raise UnavailableError(f"return_attention: {self.config.type} hands out no attention")
        pixels = pixels.to(next(self.parameters()).dtype)
        if grids is not None:
            check_patches(pixels, grids, self.config.resolved_info.image, self.config.type)
            tokens = self.of_patches(pixels, grids)[None]
            return VisionFeatures(tokens, (1, tokens.shape[1]), grids=tuple(grids))
        check_pixels(pixels, self.config.resolved_info.image, self.config.type)
        return VisionFeatures(self.of_pixels(pixels), self.config.resolved_info.grid)

    def of_patches(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        raise NotImplementedError

    def of_pixels(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        return [("embeddings", ["layer."])]

    def load_pretrained(self) -> None:
        weights = self.config.weights
        path = None if weights is None else local_path(weights.source)
        if path is None:
            raise CheckpointError(
                f"weights: {self.config.type} learns with the language model and is published inside whole checkpoints; remove "
                "weights, or name a local file that holds it"
            )
        own = set(self.layer.state_dict())
        state = strip_prefix(read_weights(path), own)
        load_exactly(self.layer, state, source=str(path), heads=())


class EveEncoder(_PatchEncoder):
    """Class token, rows of the map, a split token behind each."""

    Config: ClassVar[type[EncoderConfig]] = EveConfig
    config: EveConfig
    layer: PatchEmbeddingLayer

    def __init__(self, config: EveConfig):
        super().__init__(config)
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        self.layer = PatchEmbeddingLayer(config.width, config.patch_size, config.stride, config.num_heads)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "eve", "width": 16, "patch_size": 4, "num_heads": 2, "image_size": [16, 24]}

    @classmethod
    def unit(cls, config: EveConfig) -> int:
        return config.patch_size * config.stride

    @classmethod
    def sizes(cls, config: EveConfig, image: ImageSpec, grid: Grid) -> EncoderInfo:
        return EncoderInfo(image=image, grid=grid, width=config.width, leading=1, row_ends=True)

    def of_patches(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.layer.of_patches(patches, grids) if grids else patches.new_zeros(0, self.config.width)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.layer(pixels)


class PatchConvEncoder(_PatchEncoder):
    """One token per patch."""

    Config: ClassVar[type[EncoderConfig]] = PatchConvConfig
    config: PatchConvConfig
    layer: nn.Conv2d

    def __init__(self, config: PatchConvConfig):
        super().__init__(config)
        self.layer = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=config.bias)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "patch_conv", "width": 8, "patch_size": 4, "image_size": [8, 12]}

    def of_patches(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        side = self.config.patch_size
        return self._active(self.layer(patches.view(-1, 3, side, side)).flatten(1))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self._active(self.layer(pixels).flatten(2).transpose(1, 2))

    def _active(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.config.gelu else x
