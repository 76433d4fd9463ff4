"""How do vectors and pixels that move towards one another become masks (OffSeg's offset learning, arXiv 2508.08811)?"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.types import EncoderInfo, Grid


class OffsetDecoderConfig(StrictModel):
    """OffSeg's variant for mask vectors on features raised to four times their grid. All masks of a picture are decoded together and
    compete for its pixels: one asked for alone comes out otherwise than beside others."""

    type: Literal["offset"] = "offset"
    width: int = Field(default=128, ge=8)
    others: int = Field(default=8, ge=1)
    """Learned vectors beside the picture's own, for what is not asked for; a lone vector would move all pixels alike."""


class OffsetLearning(nn.Module):
    """Vectors ``(B, K, C)`` and pixels ``(B, N, C)``, each moved by attention over their one similarity."""

    def __init__(self, width: int):
        super().__init__()
        self.cls_offset_proj = nn.Linear(width, width, bias=False)
        self.feat_offset_proj = nn.Linear(width, width, bias=False)

    def forward(self, vectors: Tensor, pixels: Tensor, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """there ``(B, K)`` bool: which vectors count (default: all). Returns both, moved."""
        similarity = pixels.float() @ vectors.float().transpose(1, 2)  # not scaled; too large for fp16
        seen = similarity.softmax(1).transpose(1, 2).to(pixels.dtype) @ pixels
        if there is not None:
            similarity = similarity.masked_fill(~there[:, None], -torch.inf)
        owned = similarity.softmax(2).to(pixels.dtype) @ vectors
        return vectors + self.cls_offset_proj(seen), pixels + self.feat_offset_proj(owned)


class OffsetDecoder(nn.Module):
    """Prompts ``(N, C)`` and the features of their pictures → logits at four times the grid."""

    without_gradient: tuple[str, ...] = ()

    def __init__(self, config: OffsetDecoderConfig, info: EncoderInfo):
        super().__init__()
        self.config, self.grid, width = config, info.grid, config.width
        self.inner = nn.Conv2d(info.width, width, 1)
        self.raise1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.raise2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norm = nn.GroupNorm(1, width)
        self.others = nn.Parameter(torch.randn(config.others, width) * width**-0.5)
        self.offsets = OffsetLearning(width)
        self.bias = nn.Parameter(torch.zeros(()))

    @property
    def size(self) -> Grid:
        return 4 * self.grid[0], 4 * self.grid[1]

    def forward(self, prompts: Tensor, tokens: Tensor, owners: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `QueryDecoder.forward`."""
        pictures, places = owners.unique(return_inverse=True)
        maps = self.inner(tokens[pictures].transpose(1, 2).unflatten(2, self.grid))
        maps = self.raise2(nn.functional.gelu(self.raise1(maps)))
        pixels = self.norm(maps).flatten(2).transpose(1, 2)
        vectors, there, slots = self._rows(prompts, places, len(pictures))
        vectors, pixels = self.offsets(vectors, pixels, there)
        logits = torch.einsum("nc,nqc->nq", vectors[places, slots], pixels[places])
        return logits.unflatten(1, self.size) * self.config.width**-0.5 + self.bias, None

    def _rows(self, prompts: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each picture's vectors in a row of its own, padded, the learned ones last; which are there; each prompt's slot."""
        same = places[:, None] == places
        slots = same.tril(-1).sum(1)
        longest = int(slots.max()) + 1 if len(slots) else 0
        rows = prompts.new_zeros(count, longest, prompts.shape[1]).index_put((places, slots), prompts)
        there = torch.zeros(count, longest, dtype=torch.bool, device=prompts.device)
        there = there.index_put((places, slots), torch.ones_like(slots, dtype=torch.bool))
        others = self.others.to(prompts).expand(count, -1, -1)
        return torch.cat([rows, others], 1), torch.cat([there, there.new_ones(count, self.config.others)], 1), slots
