"""How do packed rows attend without a mask, each sample only to itself?

``mllm_varlen`` is registered with transformers under a name that its mask builder does not know, so no ``(T, T)`` mask
is ever made; the packed rows' boundaries travel as ``cu_seq_lens_q`` instead. On CUDA it runs torch's variable-length
kernel, on the CPU one SDPA call per sample.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.errors import UnavailableError
from mllm.varlen import segment_attention

NAME = "mllm_varlen"  # without "flash" in it: that substring changes what transformers' vision models pass
_LENGTH_BUCKETS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def register() -> None:
    """Make ``attn_implementation="mllm_varlen"`` known to transformers; safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)


def bucket(longest: int, row_length: int) -> int:
    """``longest`` rounded up to one of a few lengths: it is a plain number that compiled code specialises on."""
    return min(next((b for b in _LENGTH_BUCKETS if b >= longest), longest), row_length)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``(B, H, T, D)``, key and value ``(B, H', T, D)`` → ``(B, T, H, D)``.

    Without ``cu_seq_lens_q`` every row is one sample (right padding needs no mask: causal queries never see it; a
    left-padded batch is not for this function, use ``sdpa``). Raises `UnavailableError` for what the kernel cannot do.
    """
    if attention_mask is not None:
        raise UnavailableError(f"{NAME} takes packed boundaries (cu_seq_lens_q), not an attention mask; pass none")
    if kwargs.get("s_aux") is not None:
        raise UnavailableError(
            f"{NAME} has no attention sinks; train this model with attention: sdpa or flex_attention"
        )
    if dropout and query.is_cuda and cu_seq_lens_q is not None:
        raise UnavailableError(
            f"{NAME} has no attention dropout on CUDA; set attention_dropout to 0 or use attention: sdpa"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.shape[2] != key.shape[2]:
        if query.shape[2] != 1:
            raise UnavailableError(f"{NAME} is for training; generate with attention sdpa")
        causal, cu_seq_lens_q = False, None
    options = {"scale": scaling, "causal": causal, "window": sliding_window, "softcap": softcap, "dropout": dropout}
    if cu_seq_lens_q is None:
        return _dense(query, key, value, **options).transpose(1, 2), None
    if query.is_cuda:
        return _varlen_kernel(query, key, value, cu_seq_lens_q, max_length_q, **options), None
    return _per_sample(query, key, value, cu_seq_lens_q, **options), None


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """One sample per row, ``(B, H, T, D)`` → the same shape."""
    length, keys = query.shape[2], key.shape[2]
    mask = None
    if window is not None and causal and length > window:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask = (distance >= 0) & (distance < window)
    elif window is not None and keys > window and length == 1:
        mask = (torch.arange(keys, device=query.device) >= keys - window)[None, :]
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale=scale, causal=causal, softcap=softcap, dropout=dropout)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and length > 1,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    softcap: float,
    dropout: float,
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _per_sample(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **options: Any) -> Tensor:
    """The reference: dense attention on each packed sample alone. Returns ``(B, T, H, D)``."""
    batch, heads, length, width = query.shape

    def flat(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).reshape(1, batch * length, tensor.shape[1], width).transpose(1, 2)

    query, key, value = flat(query), flat(key), flat(value)
    edges = bounds.tolist()
    parts = [_dense(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], **options) for a, b in pairwise(edges) if b > a]
    return torch.cat(parts, dim=2).transpose(1, 2).reshape(batch, length, heads, width)


def _varlen_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """torch's variable-length kernel over the flattened rows."""
    if softcap is not None:
        raise UnavailableError(f"{NAME} has no logit soft cap on CUDA; train this model with attention: flex_attention")
    batch, heads, length, width = query.shape

    def flat(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], width)

    flattened = flat(query), flat(key), flat(value)
    output = segment_attention(*flattened, bounds, longest or length, scale=scale, causal=causal, window=window)
    return output.view(batch, length, heads, width)
