"""Which layers do the research backbones share?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Softmax attention over the second to last axis, heads in contiguous channels, scale by the head's width.

    qk_norm: LayerNorm over the head's width on queries and keys.
    """

    def __init__(self, width: int, num_heads: int, *, bias: bool = True, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k, v = self.q_norm(q).transpose(-2, -3), self.k_norm(k).transpose(-2, -3), v.transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block on ``(B, N, D)``."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, eps: float = 1e-6, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = drop(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DepthwiseConv(nn.Conv2d):
    """One odd filter per channel on a map whose channels come last: ``(B, rows, cols, C)`` to the same shape."""

    def __init__(self, width: int, kernel: int):
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def drop(rate: float) -> nn.Module:
    """Stochastic depth of a residual branch, for whole images."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def drop_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth that grows linearly from 0 to ``rate`` over ``depth`` blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def run(block: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """A block's output; its activations are recomputed in the backward pass where ``recompute``."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 for linear weights, zero biases; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def token_table(*shape: int) -> nn.Parameter:
    """A learned table, truncated normal 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
