"""What do the two streams of CrossViT see: patches of two sizes that speak through class tokens (arXiv 2103.14899)?"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder
from mllm.encoders.backbones.layers import IMAGENET, Block, drop_rates, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError
from mllm.types import ImageSpec

Two = tuple[int, int]
_EPS = 1e-6


class CrossVitConfig(BackboneConfig):
    """CrossViT, fine stream first; defaults are CrossViT-18†, the Brain-Score model's (arXiv 2203.06649)."""

    branch_sizes: Two = (240, 224)
    """Pixels that the streams see; an image of another size is resized for each."""
    patch_sizes: Two = (12, 16)
    widths: Two = (224, 448)
    num_heads: Two = (7, 7)
    mlp_ratios: tuple[float, float] = (3.0, 3.0)
    stages: list[tuple[int, int, int]] = Field(default=[(1, 6, 0), (1, 6, 0), (1, 6, 0)], min_length=1)
    """Of each stage: blocks of the fine stream, of the coarse one, and of the attention between them (0 is one)."""
    conv_stem: bool = True
    """Three convolutions in place of one per patch (the authors' †)."""
    grid: Literal["fine", "coarse"] = "fine"
    """The grid that the tokens of both streams lie on, side by side in the width."""


class CrossBlock(nn.Module):
    """A stream's class token asks the other stream: ``(B, 1 + N, D)`` → ``(B, 1, D)``."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = CrossAttention(width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.attn(self.norm1(x))


class CrossAttention(nn.Module):
    """Attention of the first token to all."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.wq(x[:, :1]), self.wk(x), self.wv(x)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _change_width(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(before, eps=_EPS), nn.GELU(), nn.Linear(before, after))


class Stage(nn.Module):
    """Each stream's own blocks; then each class token is carried to the other stream, asks it, and comes back.

    fuses: False leaves the exchange out, where nobody reads the class tokens after it.
    """

    def __init__(self, config: CrossVitConfig, counts: tuple[int, int, int], rates: list[float], fuses: bool):
        super().__init__()
        widths, heads, ratios = config.widths, config.num_heads, config.mlp_ratios
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(Block(widths[b], heads[b], ratios[b], eps=_EPS, drop_path=rates[i]) for i in range(counts[b]))
            )
            for b in range(2)
        )
        if not fuses:
            self.fusion = None
            return
        self.projs = nn.ModuleList(_change_width(widths[b], widths[1 - b]) for b in range(2))
        self.fusion = nn.ModuleList()
        for b in range(2):
            blocks = [CrossBlock(widths[1 - b], heads[1 - b]) for _ in range(max(counts[2], 1))]
            self.fusion.append(nn.Sequential(*blocks) if counts[2] else blocks[0])
        self.revert_projs = nn.ModuleList(_change_width(widths[1 - b], widths[b]) for b in range(2))

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        streams = [block(x) for block, x in zip(self.blocks, (fine, coarse))]
        if self.fusion is None:
            return streams[0], streams[1]
        attended = []
        for b in range(2):
            carried = torch.cat([self.projs[b](streams[b][:, :1]), streams[1 - b][:, 1:]], dim=1)
            back = self.revert_projs[b](self.fusion[b](carried))
            attended.append(torch.cat([back, streams[b][:, 1:]], dim=1))
        return attended[0], attended[1]


class PatchEmbed(nn.Module):
    """Pixels → ``(B, N, D)``, one convolution per patch or three."""

    def __init__(self, patch_size: int, width: int, conv_stem: bool):
        super().__init__()
        if not conv_stem:
            self.proj: nn.Module = nn.Conv2d(3, width, patch_size, stride=patch_size)
            return
        second: dict[str, Any] = {"stride": 3} if patch_size == 12 else {"stride": 2, "padding": 1}
        self.proj = nn.Sequential(
            nn.Conv2d(3, width // 4, 7, stride=4, padding=3),
            nn.ReLU(),
            nn.Conv2d(width // 4, width // 2, 3, **second),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=1 if patch_size == 12 else 2, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class CrossVit(nn.Module):
    """Pixels to the tokens of both streams, class tokens first, under the authors' names."""

    recompute = False

    def __init__(self, config: CrossVitConfig, depth: int, last_norm: bool):
        super().__init__()
        self.sizes = config.branch_sizes
        grids = [size // patch for size, patch in zip(config.branch_sizes, config.patch_sizes)]
        widths = config.widths
        self.cls_token = nn.ParameterList(token_table(1, 1, width) for width in widths)
        self.pos_embed = nn.ParameterList(token_table(1, 1 + side**2, w) for side, w in zip(grids, widths))
        self.patch_embed = nn.ModuleList(
            PatchEmbed(patch, width, config.conv_stem) for patch, width in zip(config.patch_sizes, widths)
        )
        self.blocks = nn.ModuleList()
        total = sum(max(counts[:2]) for counts in config.stages)
        rates, start = drop_rates(config.drop_path, total), 0
        for i, counts in enumerate(config.stages[:depth]):
            self.blocks.append(Stage(config, counts, rates[start:], fuses=i + 1 < depth or config.keep_prefix))
            start += max(counts[:2])
        self.norm = nn.ModuleList(nn.LayerNorm(w, eps=_EPS) for w in widths) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Fine and coarse tokens ``(B, 1 + N, D)`` after each stage, the last ones normed where there is a norm."""
        streams = []
        for b, size in enumerate(self.sizes):
            own = pixels
            if pixels.shape[2] != size:
                own = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
            patches = self.patch_embed[b](own)
            x = torch.cat([self.cls_token[b].expand(len(pixels), -1, -1), patches], dim=1)
            streams.append(x + self.pos_embed[b])
        outputs = []
        for stage in self.blocks:
            streams = run(stage, *streams, recompute=self.recompute)
            outputs.append(streams)
        if self.norm is not None:
            fine, coarse = outputs[-1]
            outputs[-1] = (self.norm[0](fine), self.norm[1](coarse))
        return outputs


class CrossVitEncoder(BackboneEncoder):
    """Both streams' patch tokens side by side, on the grid of one of them. ``layers`` counts stages. Prefix: the class
    tokens."""

    Config: ClassVar[type[EncoderConfig]] = CrossVitConfig
    config: CrossVitConfig
    model: CrossVit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "crossvit",
            "branch_sizes": [36, 32],
            "patch_sizes": [12, 16],
            "widths": [16, 24],
            "num_heads": [2, 3],
            "stages": [[1, 1, 0], [1, 2, 1]],
            "image_size": 36,
            "keep_prefix": True,
        }

    @classmethod
    def default_image(cls, config: CrossVitConfig) -> ImageSpec:
        return ImageSpec(height=config.branch_sizes[0], width=config.branch_sizes[0], **IMAGENET)

    @classmethod
    def build(cls, config: CrossVitConfig) -> CrossVit:
        for b, name in enumerate(("fine", "coarse")):
            if config.widths[b] % config.num_heads[b]:
                raise ConfigError(f"num_heads: {config.num_heads[b]} do not divide width {config.widths[b]} ({name})")
            if config.branch_sizes[b] % config.patch_sizes[b]:
                size, patch = config.branch_sizes[b], config.patch_sizes[b]
                raise ConfigError(f"branch_sizes: {size} is no multiple of the patch size {patch} ({name})")
            if config.conv_stem and config.patch_sizes[b] not in (12, 16):
                raise ConfigError(
                    f"conv_stem: made for patch sizes 12 and 16, not {config.patch_sizes[b]}; set conv_stem: false"
                )
        if config.info is not None and config.info.image.height != config.info.image.width:
            image = config.info.image
            raise ConfigError(f"image_size: crossvit takes squares, not {image.height} x {image.width}")
        depth = max(take_layers(config.layers, len(config.stages), lowest=1))
        return CrossVit(config, depth, config.final_norm and depth == len(config.stages))

    @classmethod
    def published_names(cls, config: CrossVitConfig) -> set[str]:
        return super().published_names(config.model_copy(update={"keep_prefix": True}))

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: CrossVitConfig) -> dict[str, Tensor]:
        """timm's copies call ``pos_embed.0`` ``pos_embed_0``."""
        return {re.sub(r"(^|\.)(pos_embed|cls_token)_(\d)$", r"\1\2.\3", key): value for key, value in state.items()}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs, result = self.model(pixels), []
        sides = [size // patch for size, patch in zip(self.config.branch_sizes, self.config.patch_sizes)]
        order = (1, 0) if self.config.grid == "fine" else (0, 1)
        for count in take_layers(self.config.layers, len(self.config.stages), lowest=1):
            for b in order:
                x = outputs[count - 1][b]
                result.append(LayerOutput(x[:, 1:], (sides[b], sides[b]), x[:, :1]))
        return result
