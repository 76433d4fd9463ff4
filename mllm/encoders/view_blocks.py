"""Of what is a transformer made that sees several views of a scene? DINOv2's blocks, queries and keys normalised and turned by position,
and attention that spans the views of a scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllm.types import Grid

_ROPE_BASE = 100.0
_OFFSET = 0.1
"""Patches by which DINOv2 lets a resized position table reach beyond its grid."""
Rotation = tuple[Tensor, Tensor]
"""cos, sin ``(N, channels of a head)`` of one view's tokens."""
Run = Callable[..., Tensor]
"""(block, its inputs …) → output; recomputes the block in the backward pass where that is asked for."""


class Attention(nn.Module):
    """Self-attention, with queries and keys normalised per head and rotated by position where ``qk_norm``."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202) with about as many weights as `Mlp`, as DINOv2's giant has it."""

    def __init__(self, width: int):
        super().__init__()
        inner = -(-int(4 * width * 2 / 3) // 8) * 8
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block, with LayerScale where it has a scale. gated: see `GatedMlp`."""

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool, scale: float | None, eps: float, gated: bool = False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qk_norm=qk_norm, eps=1e-5)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GatedMlp(width) if gated else Mlp(width)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchConv(nn.Module):
    """Pixels ``(B, 3, H, W)`` → patches ``(B, N, C)``."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class DinoV2(nn.Module):
    """DINOv2 (arXiv 2304.07193); returns tokens: class, registers (arXiv 2309.16588), patches.

    Args:
        num_registers: None: as published without any.
        image_size: of its position table, which is resized on use (`resized_positions`).
        antialias: how.
        gated: see `GatedMlp` (DINOv2's giant).
        normed: tokens are normalised at the end.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        depth: int,
        patch_size: int,
        image_size: int,
        num_registers: int | None,
        antialias: bool = True,
        gated: bool = False,
        normed: bool = True,
    ):
        super().__init__()
        self.side, self.patch_size, self.antialias = image_size // patch_size, patch_size, antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.side**2, width) * 0.02)
        if num_registers is not None:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))
        self.registers = num_registers is not None
        self.patch_embed = PatchConv(width, patch_size)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qk_norm=False, scale=1.0, eps=1e-6, gated=gated) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6) if normed else nn.Identity()

    def forward(self, pixels: Tensor, run: Run) -> Tensor:
        batch = pixels.shape[0]
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.patch_embed(pixels)], dim=1)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        x = x + resized_positions(self.pos_embed, self.side, grid, antialias=self.antialias)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = run(block, x, None)
        return self.norm(x)


def resized_positions(table: Tensor, side: int, grid: Grid, *, antialias: bool) -> Tensor:
    """A position table ``(1, 1 + side², C)``, class token first, for a grid: bicubic, antialiased by target size, or plainly by a factor
    that reaches a tenth of a patch beyond the grid, as DINOv2's models without registers do it."""
    if grid == (side, side):
        return table
    image = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    if antialias:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    else:
        factors = [(cells + _OFFSET) / side for cells in grid]
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    assert image.shape[2:] == grid
    return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class ViewsModel(nn.Module):
    """A model of several views, whose blocks can be computed again in the backward pass in place of keeping what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block's output."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return block(*inputs)


def token_places(grid: Grid, num_special: int, device: torch.device) -> Tensor:
    """(row, column) of every token of one view, patches counted from 1, special tokens at (0, 0): ``(P + N, 2)``."""
    rows, cols = (torch.arange(1, cells + 1, device=device) for cells in grid)
    return torch.cat([rows.new_zeros(num_special, 2), torch.cartesian_prod(rows, cols)])


def across_views(run: Run, block: nn.Module, x: Tensor, views: Sequence[int], rotation: Rotation | None) -> Tensor:
    """A block whose attention spans the views of a scene; scenes with equally many views run as one batch.

    Args:
        run: calls the block.
        block: a `Block`.
        x: tokens ``(B, N, C)``, the views of a scene side by side.
        views: how many each scene has, in order.
        rotation: of one view's tokens.

    Returns:
        ``(B, N, C)``
    """
    if len(set(views)) == 1:
        count = views[0]
        wide = x.reshape(len(views), count * x.shape[1], x.shape[2])
        turned = None if rotation is None else (rotation[0].repeat(count, 1), rotation[1].repeat(count, 1))
        return run(block, wide, turned).reshape(x.shape)
    parts = [across_views(run, block, part, [len(part)], rotation) for part in x.split(list(views))]
    return torch.cat(parts)


def rotary_table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions ``(…, 2)`` → cos, sin ``(…, head_dim)``: the first half of the channels turns by row, the second by
    column."""
    quarter = head_dim // 4
    frequency = _ROPE_BASE ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angles = positions[..., None].float() * frequency
    angles = torch.cat([angles, angles], dim=-1).flatten(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``(…, head_dim)``: each half of the channels is rotated between its own two quarters."""
    a, b, c, d = x.chunk(4, dim=-1)
    return x * cos + torch.cat([-b, a, -d, c], dim=-1) * sin
