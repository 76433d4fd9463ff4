"""What do a few compressed tokens see that look things up among many cheap ones: LookupViT (arXiv 2407.12753)?"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import IMAGENET, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError
from mllm.types import Grid, ImageSpec


class LookupVitConfig(BackboneConfig):
    """LookupViT; defaults follow the paper (ViT-B, 5 × 5 compressed tokens). The authors published no code; what other
    people's module does otherwise (lucidrains' ``look_vit``) is a setting, and checked against it."""

    width: int = Field(default=768, gt=0, multiple_of=4)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    head_width: int = Field(default=64, gt=0)
    lookup_heads: int = Field(default=12, gt=0)
    lookup_head_width: int = Field(default=64, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    lookup_mlp_ratio: float = Field(default=0.5, gt=0)
    """Hidden width of the many tokens' MLP; 0.5: the paper's bottleneck."""
    patch_size: int = Field(default=16, gt=0)
    """Pixels of one lookup token."""
    compressed_grid: Grid = (5, 5)
    """Compressed tokens. No weight depends on it: it may be another one than in training, best one of those that it was
    trained with."""
    patch_kernel: int = Field(default=1, ge=1)
    """Patches that a lookup token is made of, across; odd."""
    infusion: Literal["probabilities", "logits"] = "probabilities"
    """How compressed tokens are read back: by the transposed probabilities of the gathering (the paper), or by a softmax
    of the transposed logits."""
    lookup_norm: bool = False
    """A norm on the many tokens themselves after each infusion."""
    output: Literal["compressed", "lookup", "both"] = "compressed"
    """Which tokens are the features; both: on the finer grid, side by side in the width."""


class Norm(nn.Module):
    """LayerNorm without bias whose gain is ``1 + gamma``."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * (self.gamma + 1)


def _mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    unused = nn.Identity  # the module that published weights are named after has dropout here
    return nn.Sequential(Norm(width), nn.Linear(width, hidden), nn.GELU(), unused(), nn.Linear(hidden, width), unused())


class Attention(nn.Module):
    """Attention of ``(B, N, D)`` to itself, or to another set of tokens that is normed by ``norm_context``. ``reuses``:
    it has no queries and keys of its own and is given logits or probabilities."""

    def __init__(self, width: int, num_heads: int, head_width: int, *, across: bool = False, reuses: bool = False):
        super().__init__()
        inner = num_heads * head_width
        self.num_heads, self.scale = num_heads, head_width**-0.5
        self.norm = nn.Identity() if reuses else Norm(width)
        self.norm_context = Norm(width) if across else nn.Identity()
        self.to_q = None if reuses else nn.Linear(width, inner, bias=False)
        self.to_k = None if reuses else nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Identity(), nn.Linear(inner, width, bias=False))

    def logits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(B, heads, N, N')``."""
        assert self.to_q is not None and self.to_k is not None
        x = self.norm(x)
        other = x if context is None else self.norm_context(context)
        return (self._split(self.to_q(x)) * self.scale) @ self._split(self.to_k(other)).transpose(-1, -2)

    def read(self, weights: Tensor, context: Tensor, *, own: bool = False) -> Tensor:
        """Values of ``context`` weighted by ``(B, heads, N, N')``; own: the context is what asks."""
        values = self._split(self.to_v(self.norm(context) if own else self.norm_context(context)))
        return self.to_out((weights @ values).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class LookupBlock(nn.ModuleList):
    """Gather, think, infuse: compressed tokens read the lookup tokens, are worked on, and are read back by them.

    infuses: False leaves the last part out, where nobody reads the lookup tokens after it.
    """

    def __init__(self, config: LookupVitConfig, infuses: bool):
        width, across = config.width, (config.lookup_heads, config.lookup_head_width)
        parts: list[nn.Module] = [
            Attention(width, config.num_heads, config.head_width),
            _mlp(width, config.mlp_ratio),
            Attention(width, *across, across=True),
        ]
        if infuses:
            norm = Norm(width) if config.lookup_norm else nn.Identity()
            parts += [Attention(width, *across, across=True, reuses=True), norm, _mlp(width, config.lookup_mlp_ratio)]
        super().__init__(parts)
        self.by_logits = config.infusion == "logits"

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        attention, mlp, gather, *rest = cast("list[Any]", list(self))
        logits = gather.logits(compressed, lookup)
        gathered = logits.softmax(-1)
        compressed = compressed + gather.read(gathered, lookup)
        compressed = compressed + attention.read(attention.logits(compressed).softmax(-1), compressed, own=True)
        compressed = compressed + mlp(compressed)
        if rest:
            infuse, norm, lookup_mlp = rest
            back = logits.transpose(-1, -2).softmax(-1) if self.by_logits else gathered.transpose(-1, -2)
            lookup = norm(lookup + infuse.read(back, compressed))
            lookup = lookup + lookup_mlp(lookup)
        return compressed, lookup


class LookupVit(nn.Module):
    """Pixels to both sets of tokens, under lucidrains' names."""

    recompute = False

    def __init__(self, config: LookupVitConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.compressed_grid
        channels, kernel = 3 * config.patch_size**2, config.patch_kernel
        conv = nn.Conv2d(channels, config.width, kernel, padding=kernel // 2)
        self.to_patches = nn.Sequential(nn.Identity(), conv, nn.Identity(), Norm(config.width))
        finer = config.output != "compressed"
        self.layers = nn.ModuleList(LookupBlock(config, infuses=finer or i + 1 < depth) for i in range(depth))
        self.norm = Norm(config.width) if last_norm and config.output != "lookup" else None
        self.highres_norm = Norm(config.width) if last_norm and finer else None

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compressed ``(B, M, D)`` and lookup tokens ``(B, N, D)`` before the first block and after each; not normed."""
        size = self.patch_size
        cells = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B, 3, rows, p, columns, p
        cells = cells.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        x = self.to_patches[3](self.to_patches[1](cells).permute(0, 2, 3, 1))
        x = x + _positions((x.shape[1], x.shape[2]), x.shape[3], x.device).to(x.dtype)
        small = F.interpolate(x.permute(0, 3, 1, 2).float(), size=self.grid, mode="bilinear").to(x.dtype)
        streams = (small.flatten(2).transpose(1, 2), x.flatten(1, 2))
        outputs = [streams]
        for layer in self.layers:
            streams = run(layer, *streams, recompute=self.recompute)
            outputs.append(streams)
        return outputs


def _positions(grid: Grid, width: int, device: torch.device) -> Tensor:
    """``(rows, columns, D)``: sine and cosine of the column, then of the row."""
    quarter = width // 4
    speed = 10000.0 ** -(torch.arange(quarter, device=device) / max(quarter - 1, 1))
    row = (torch.arange(grid[0], device=device)[:, None, None] * speed).expand(*grid, quarter)
    column = (torch.arange(grid[1], device=device)[None, :, None] * speed).expand(*grid, quarter)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)


class LookupVitEncoder(BackboneEncoder):
    """A few tokens of a picture seen at full resolution."""

    Config: ClassVar[type[EncoderConfig]] = LookupVitConfig
    config: LookupVitConfig
    model: LookupVit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "head_width": 6, "lookup_heads": 3, "lookup_head_width": 5}
        return {"type": "lookupvit", **sizes, "patch_size": 4, "compressed_grid": [3, 3], "image_size": [24, 24]}

    @classmethod
    def default_image(cls, config: LookupVitConfig) -> ImageSpec:
        return ImageSpec(height=224, width=224, **IMAGENET)

    @classmethod
    def build(cls, config: LookupVitConfig) -> LookupVit:
        if config.patch_kernel % 2 == 0:
            raise ConfigError(f"patch_kernel: expected an odd number of patches, got {config.patch_kernel}")
        if min(config.compressed_grid) < 1:
            raise ConfigError(f"compressed_grid: expected 1 or more rows and columns, got {config.compressed_grid}")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "one lookup token")
        depth = max(take_layers(config.layers, config.depth))
        return LookupVit(config, depth, config.final_norm and depth == config.depth)

    @classmethod
    def published_names(cls, config: LookupVitConfig) -> set[str]:
        names = super().published_names(config.model_copy(update={"output": "both"}))
        return names | {"pos_embedding", "to_logits.weight"}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs, result = self.model(pixels), []
        grid = (pixels.shape[2] // self.config.patch_size, pixels.shape[3] // self.config.patch_size)
        norms = (self.model.norm, self.model.highres_norm)
        for count in take_layers(self.config.layers, self.config.depth):
            streams = [
                x if norm is None or count < self.config.depth else norm(x)
                for x, norm in zip(outputs[count], norms, strict=True)
            ]
            if self.config.output != "lookup":
                result.append(LayerOutput(streams[0], self.model.grid))
            if self.config.output != "compressed":
                result.append(LayerOutput(streams[1], grid))
        return result
