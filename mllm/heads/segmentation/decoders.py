"""Which decoders turn an encoder's features and projected hidden states into masks?"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import ConfigError
from mllm.heads.segmentation.offset import OffsetDecoder, OffsetDecoderConfig
from mllm.heads.segmentation.sam import SamDecoder, SamDecoderConfig
from mllm.heads.segmentation.sam_unet import SamUnetDecoder, SamUnetDecoderConfig
from mllm.types import EncoderInfo, Grid


class QueryDecoderConfig(StrictModel):
    """A light decoder for small models: the features are raised to four times their grid, once a picture, and every mask is a query's
    product with them, after it has looked at them (Mask2Former's idea, arXiv 2112.01527)."""

    type: Literal["query"] = "query"
    width: int = Field(default=128, ge=8)
    depth: int = Field(default=2, ge=0)
    heads: int = Field(default=4, ge=1)


DecoderConfig = Annotated[
    QueryDecoderConfig | SamDecoderConfig | SamUnetDecoderConfig | OffsetDecoderConfig, Field(discriminator="type")
]


class QueryDecoder(nn.Module):
    """Prompts ``(N, C)`` and the features of their pictures → logits at four times the grid."""

    without_gradient: tuple[str, ...] = ()

    def __init__(self, config: QueryDecoderConfig, info: EncoderInfo):
        super().__init__()
        if config.width % config.heads or config.width % 4:
            raise ConfigError(
                f"decoder.width is {config.width}: it must be divisible by heads ({config.heads}) and by 4"
            )
        self.config, self.grid, width = config, info.grid, config.width
        self.inner = nn.Linear(info.width, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Look(width, config.heads) for _ in range(config.depth))
        self.raise1 = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.norm1 = nn.GroupNorm(1, width // 2)
        self.raise2 = nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)
        self.smooth = nn.Conv2d(width // 4, width // 4, 3, padding=1)
        self.out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width // 4 + 1))

    @property
    def size(self) -> Grid:
        return 4 * self.grid[0], 4 * self.grid[1]

    def seen(self, tokens: Tensor) -> Tensor:
        """Features ``(B, N', D)`` as prompts look at them ``(B, N', C)``."""
        return self.norm(self.inner(tokens) + _positions(self.grid, self.config.width).to(tokens))

    def forward(self, prompts: Tensor, tokens: Tensor, owners: Tensor) -> tuple[Tensor, Tensor | None]:
        """prompts ``(N, C)``, or ``(N, P, C)`` where several stand for one mask; tokens ``(B, N', D)`` of B pictures; owners ``(N,)``:
        the picture of each → logits ``(N, 4h, 4w)``, and what the decoder takes its IoU for ``(N,)`` (None: it does not say)."""
        rows, columns = self.grid
        pixels = self.seen(tokens)
        queries = prompts if prompts.dim() == 3 else prompts[:, None]
        for layer in self.layers:
            queries = layer(queries, pixels[owners])
        maps = pixels.transpose(1, 2).unflatten(2, (rows, columns))
        maps = nn.functional.gelu(self.norm1(self.raise1(maps)))
        maps = nn.functional.gelu(self.raise2(maps))
        maps = maps + self.smooth(maps)
        weights, bias = self.out(queries.mean(1)).split([maps.shape[1], 1], -1)
        return torch.einsum("nc,nchw->nhw", weights, maps[owners]) + bias[..., None], None


class _Look(nn.Module):
    """A query looks at its picture, then thinks."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm(queries), pixels, pixels, need_weights=False)[0]
        return queries + self.mlp(queries)


def _positions(grid: Grid, width: int) -> Tensor:
    """Sine and cosine of rows and columns ``(rows * columns, width)``."""
    parts = []
    for axis, number in enumerate(grid):
        places = torch.arange(number).float()[:, None] * torch.exp(
            -math.log(100.0) * torch.arange(width // 4).float() / (width // 4)
        )
        waves = torch.cat([places.sin(), places.cos()], 1)
        parts.append(waves[:, None].expand(-1, grid[1], -1) if axis == 0 else waves[None].expand(grid[0], -1, -1))
    return torch.cat(parts, -1).flatten(0, 1)


DECODERS: dict[str, Any] = {
    "query": QueryDecoder,
    "sam": SamDecoder,
    "sam_unet": SamUnetDecoder,
    "offset": OffsetDecoder,
}
