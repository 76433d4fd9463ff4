"""How does FlashAttention 4 (the package flash-attn-4) run in the place of torch's own attention kernel?

torch has a registration of its own for the package, but calls it otherwise than its releases of today are called: it takes two results of a
forward pass that gives five, and before 2.12 it hands on −1 for "no window" and refuses the backward pass of packed rows because of it. So
the operations are registered here, by the same door (`torch.nn.attention.register_flash_attention_impl`).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mllm.errors import UnavailableError

KERNELS = "flash_attn.cute.interface"


class Registered:
    """What torch keeps while the kernels are active; without its library they are torch's own again."""

    def __init__(self, library: torch.library.Library):
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def register(kernels: Any = None, device: str = "CUDA") -> Registered:
    """Let FlashAttention 4 do torch's attention, packed and dense, forward and backward.

    kernels: the package's module of kernels (None: imported); device: torch's name of the devices for which.
    """
    kernels = importlib.import_module(KERNELS) if kernels is None else kernels

    def packed_forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug, *, scale=None, **more):
        windows = _windows(more)
        out, lse = _forward(
            kernels, q, k, v, causal, scale, dropout, debug, **_lengths(ends_q, ends_k, max_q, max_k), **windows
        )
        return out, lse, *_no_random(q)

    def packed_backward(
        up, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout, causal, state, unused, *, scale=None, **more
    ):
        windows = _windows(more)
        lengths = _lengths(ends_q, ends_k, max_q, max_k)
        return _backward(kernels, up, q, k, v, out, lse, causal, scale, dropout, **lengths, **windows)

    def dense_forward(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
        out, lse = _forward(kernels, *_turned(q, k, v), causal, scale, dropout, debug)
        return out.transpose(1, 2), lse, None, None, q.size(2), k.size(2), *_no_random(q)

    def dense_backward(
        up, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None
    ):
        found = _backward(kernels, *_turned(up, q, k, v, out), lse, causal, scale, dropout)
        return _turned(*found)

    library = torch.library.Library("aten", "IMPL", device)
    library.impl("_flash_attention_forward", packed_forward, device)
    library.impl("_flash_attention_backward", packed_backward, device)
    library.impl("_scaled_dot_product_flash_attention", dense_forward, device)
    library.impl("_scaled_dot_product_flash_attention_backward", dense_backward, device)
    return Registered(library)


def _forward(kernels: Any, *given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    q, k, v, causal, scale, dropout, debug = given
    if dropout or debug:
        raise UnavailableError("FlashAttention 4 drops no attention scores and shows none; train with attention: sdpa")
    found = kernels._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **more)
    return found[0], found[1].contiguous()


def _backward(kernels: Any, *given: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    up, q, k, v, out, lse, causal, scale, dropout = given
    if dropout:
        raise UnavailableError("FlashAttention 4 drops no attention scores; train with attention: sdpa")
    exact = torch.are_deterministic_algorithms_enabled()
    found = kernels._flash_attn_bwd(
        q, k, v, out, up, lse.contiguous(), softmax_scale=scale, causal=causal, deterministic=exact, **more
    )
    return found[0], found[1], found[2]


def _windows(given: dict[str, Any]) -> dict[str, int | None]:
    """torch's windows as the package takes them (None: none), of arguments among which nothing else may be."""
    windows = {side: given.pop(f"window_size_{side}", None) for side in ("left", "right")}
    other = [name for name, value in given.items() if value is not None]
    if other:
        raise UnavailableError(
            f"FlashAttention 4 is not called with {', '.join(other)} here; train with attention: sdpa"
        )
    return {f"window_size_{side}": None if value in (None, -1) else value for side, value in windows.items()}


def _lengths(ends_q: Tensor | None, ends_k: Tensor | None, max_q: int, max_k: int) -> dict[str, Any]:
    """Where packed samples end, and the longest; {} of dense rows."""
    if ends_q is None:
        return {}
    return {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}


def _turned(*tensors: Tensor) -> Any:
    """(B, heads, T, d) ↔ (B, T, heads, d)."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _no_random(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A generator's seed and offset and dropped scores, where nothing is dropped."""
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return seed, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)
