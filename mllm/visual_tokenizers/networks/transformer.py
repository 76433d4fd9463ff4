"""Which small transformers sit between a vision encoder, the codes and the teacher's features?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.types import Grid


class Attention(nn.Module):
    """Multi-head self-attention, bias on queries and values only (as in BEiT) unless ``key_bias``."""

    def __init__(self, dim: int, heads: int, *, key_bias: bool = False):
        super().__init__()
        if dim % heads:
            raise ConfigError(f"width {dim} is not a multiple of {heads} heads")
        self.heads, self.key_bias = heads, key_bias
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        bias = self.qkv.bias if self.key_bias else torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = split_heads(F.linear(x, self.qkv.weight, bias), self.heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """``(B, N, 3·heads·d)`` → ``(3, B, heads, N, d)``."""
    return qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads))).permute(2, 0, 3, 1, 4)


def rotary_table(grid: Grid, head_dim: int, device: torch.device, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin ``(N, head_dim)`` of 2-D positions: the first half of the channels turns by row, the second by
    column, each frequency twice, half a block apart (Qwen2-VL's vision rotary embedding)."""
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    angles = torch.cat([p.reshape(-1, 1).float() * frequencies for p in (rows, columns)], 1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of ``(..., N, head_dim)``; channel i pairs with channel i + head_dim/2."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * table[0] + turned * table[1]).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP of 4 × width."""

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-6, key_bias: bool = False, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, heads, key_bias=key_bias)
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CodeTransformer(nn.Module):
    """Code vectors ``(B, N, C)`` → tokens ``(B, N, width)`` by a ViT of patch size 1 with a class token
    (TokenFlow's semantic decoder). Another grid than the built one gets resized (bicubic) position embeddings."""

    def __init__(self, in_dim: int, width: int, depth: int, heads: int, grid: Grid):
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(in_dim, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, grid[0] * grid[1] + 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self.embed(x)], 1) + self._positions(grid or self.grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])

    def _positions(self, grid: Grid) -> Tensor:
        if tuple(grid) == tuple(self.grid):
            return self.positions
        first, patches = self.positions[:, :1], self.positions[:, 1:]
        table = patches.transpose(1, 2).unflatten(2, self.grid)
        # The published models resize by a factor nudged by 0.1 of a cell (the DINO code's guard against rounding down).
        factors = tuple((new + 0.1) / old for new, old in zip(grid, self.grid))
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
        return torch.cat([first, table.flatten(2).transpose(1, 2)], 1)


class RotaryTransformer(nn.Module):
    """``(B, N, in)`` → ``(B, N, out)``: linear, blocks with 2-D rotary positions, linear (ILLUME+'s semantic
    branch)."""

    def __init__(self, in_dim: int, width: int, out_dim: int, depth: int, heads: int, *, final_norm: bool = False):
        super().__init__()
        if depth and (width // heads) % 4:
            raise ConfigError(f"width/heads is {width / heads:g}; 2-D rotary positions need a multiple of 4")
        self.heads, self.head_dim = heads, width // heads
        self.proj_in = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, key_bias=True) for _ in range(depth))
        self.proj_out = nn.Linear(width, out_dim)
        self.norm = nn.LayerNorm(out_dim, eps=1e-6) if final_norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.proj_in(x)
        rotary = rotary_table(grid, self.head_dim, x.device)
        for block in self.blocks:
            x = block(x, rotary)
        return self.norm(self.proj_out(x))


class AttentionProjection(nn.Module):
    """Change of width by attention (DualToken): ``h = Linear(norm x) + Attn(norm x)``, then ``h + GeGLU(h)``.

    Down (out < in): heads are averaged, each as wide as the output. Up: heads are concatenated; ``causal`` follows
    raster order. ``(B, N, in)`` → ``(B, N, out)``.
    """

    def __init__(self, in_dim: int, out_dim: int, heads: int, *, causal: bool = False):
        super().__init__()
        inner = max(in_dim, out_dim)
        if inner % heads or (in_dim > out_dim and inner // heads != out_dim):
            raise ConfigError(
                f"attention projection {in_dim} → {out_dim} with {heads} heads: the wider side must split into them"
                + (f", each of width {out_dim}" if in_dim > out_dim else "")
            )
        self.heads, self.causal, self.down = heads, causal, in_dim > out_dim
        self.norm1, self.norm3 = nn.LayerNorm(in_dim), nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.qkv = nn.Linear(in_dim, 3 * inner, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(out_dim, out_dim)
        self.proj = nn.Linear(in_dim, out_dim)
        self.mlp_norm = nn.LayerNorm(out_dim, eps=1e-6)
        self.gate, self.up = nn.Linear(out_dim, 2 * out_dim), nn.Linear(out_dim, 2 * out_dim)
        self.mlp_out = nn.Linear(2 * out_dim, out_dim)

    def _attend(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = split_heads(F.linear(x, self.qkv.weight, bias), self.heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.mean(1) if self.down else h.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(self.norm3(x)) + self._attend(self.norm1(x))
        m = self.mlp_norm(self.norm2(h))
        return h + self.mlp_out(F.gelu(self.gate(m), approximate="tanh") * self.up(m))


def tanh_bottleneck(in_dim: int, out_dim: int) -> nn.Sequential:
    """``Linear(in, in) → tanh → Linear(in, out)``: TokenFlow's way into and out of the codes."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, out_dim))
