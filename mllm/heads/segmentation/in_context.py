"""How does a picture with its mask become prompts that mark the same in another picture (DC-SAM, arXiv 2504.12080)?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import StrictModel
from mllm.types import Grid


class ExamplesConfig(StrictModel):
    """Questions that show another picture with a mask on it: "segment what this marks"."""

    token: str = "[EX]"
    """Stands in a question, behind its picture, for a mask that is given."""
    queries: int = Field(default=25, ge=1)
    """Prompts that say what a mask marks, and as many that say what it leaves out."""
    heads: int = Field(default=8, ge=1)
    mlp_width: int = Field(default=2048, ge=1)
    question: str = "Please segment the same."
    """What `segment` asks where an example is given and no phrase."""


@dataclass
class Examples:
    """masks ``(E, rows, columns)`` uint8, of which 1 marks; owners ``(E,)``: the picture of each in the batch; which ``(K,)``: for each
    mask that is asked for its example's number, -1 where it has none."""

    masks: Tensor
    owners: Tensor
    which: Tensor


def on_grid(masks: Tensor, grid: Grid) -> Tensor:
    """Masks ``(E, rows, columns)`` → ``(E, h * w)`` of 0 and 1: the cells that are marked by more than half; where a mask fills none so
    far, those that it touches."""
    shares = F.adaptive_avg_pool2d((masks == 1).float()[:, None], grid).flatten(1)
    most = shares > 0.5
    return torch.where(most.any(1, keepdim=True), most, shares > 0).float()


class CycleLayer(nn.Module):
    """Queries ``(B, Q, C)`` look at one another, then at pixels ``(B, N, C)`` whose best query leads back to a pixel of the same mask.

    For each head: pixel j's best query is i, and i's best pixel is j*; j is seen only where the mask has one value at j and j*. At
    least the pair with the largest logit is kept. A post-norm layer with ReLU. The published code takes, in a batch, another sample's
    mask for some heads; this takes each sample's own.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int = 2048):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        """mask ``(B, N)`` of 0 and 1."""
        queries = self.norm1(queries + self.self_attn(queries, queries, queries, need_weights=False)[0])
        queries = self.norm2(queries + self._look(queries, pixels, mask))
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))

    def _look(self, queries: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        part, heads = self.multihead_attn, self.multihead_attn.num_heads
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(
                (queries, pixels, pixels), part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3), strict=True
            )
        )
        logits = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
        back = logits.argmax(3).gather(2, logits.argmax(2))  # (B, heads, N): where each pixel's best query leads
        own = mask[:, None].expand(-1, heads, -1)
        shares = logits.masked_fill((own.gather(2, back) != own)[:, :, None], -torch.inf).softmax(3).to(v.dtype)
        return part.out_proj((shares @ v).transpose(1, 2).flatten(2))


class InContextPrompts(nn.Module):
    """A marked picture and another one → prompts ``(B, 2 Q, C)`` for SAM's decoder (`SamDecoder.answer`): Q that say what the mask
    marks, Q that say what it leaves out.

    width: C, SAM's; feature_width: of the features that tell what is alike (any encoder's); num_queries: Q.
    """

    def __init__(
        self, width: int, feature_width: int, num_queries: int = 25, num_heads: int = 8, mlp_width: int = 2048
    ):
        super().__init__()
        self.inner = nn.Linear(feature_width, width)
        self.join = nn.Linear(3 * width + 1, width)
        self.queries = nn.Parameter(torch.randn(2, num_queries, width) * 0.02)
        self.support, self.query = (CycleLayer(width, num_heads, mlp_width) for _ in range(2))

    def forward(self, marked: Tensor, other: Tensor, mask: Tensor, marked_sam: Tensor, other_sam: Tensor) -> Tensor:
        """marked, other ``(B, N, D)``: features of both pictures; mask ``(B, N)`` of 0 and 1 on the first; marked_sam, other_sam
        ``(B, N, C)``: SAM's features of both."""
        found = []
        for side, queries in enumerate(self.queries):
            own = mask.to(marked.dtype) if side == 0 else 1 - mask.to(marked.dtype)
            alike = likeness(marked, other, own)
            first, second = self.inner(marked), self.inner(other)
            mean = (first * own[..., None]).sum(1, keepdim=True) / own.sum(1).clamp(min=1)[:, None, None]
            first = self._joined(first, mean, marked_sam, own)
            second = self._joined(second, mean, other_sam, alike)
            vectors = self.support(queries.expand(len(marked), -1, -1), first, own)
            found.append(self.query(vectors, second, (alike > 0.5).to(own.dtype)))
        return torch.cat(found, 1)

    def _joined(self, features: Tensor, mean: Tensor, sam: Tensor, mask: Tensor) -> Tensor:
        return self.join(torch.cat([features, mean.expand_as(features), sam, 10 * mask[..., None]], -1))


def likeness(marked: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """How alike the other picture's pixels are to the marked ones, ``(B, N)`` from 0 (its least) to 1 (its most); 0 for an empty mask."""
    cosines = F.normalize(other.float(), dim=-1) @ F.normalize(marked.float(), dim=-1).transpose(1, 2)
    best = cosines.masked_fill(mask[:, None] == 0, -1.0).amax(2)
    low, high = best.amin(1, keepdim=True), best.amax(1, keepdim=True)
    return ((best - low) / (high - low).clamp(min=1e-7)).to(other.dtype)
