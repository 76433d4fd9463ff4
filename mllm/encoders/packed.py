"""How do images of different sizes run through one encoder at once, without padding and without seeing each other?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from mllm.varlen import segment_attention, varlen_attn

_NAME = "mllm_packed"
VARLEN = "mllm_packed_flash"
"""For models that hand the segments' ends to what they take for flash attention, and split the sequence themselves else."""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attention on ``(heads, ΣN, d)`` within each of the segments; as one kernel on a GPU in half precision."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and query.is_cuda and half and query.shape[-1] % 8 == 0:
        ends, longest = _ends(tuple(lengths), query.device), max(lengths)
        q, k, v = (part.transpose(0, 1).contiguous() for part in (query, key, value))
        return segment_attention(q, k, v, ends, longest, scale=scale, causal=False).transpose(0, 1)
    segments = zip(*(part.split(list(lengths), dim=1) for part in (query, key, value)))
    return torch.cat([F.scaled_dot_product_attention(*one, scale=scale) for one in segments], dim=1)


@lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where segments end, ``(S + 1,)``. Kept, since all layers of a pass ask for the same, and at each copy to the GPU the host waits;
    never an inference tensor, which a later backward pass could not save."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: ``(1, heads, ΣN, d)`` → ``(1, ΣN, heads, d)``; attention_mask: the segments' lengths ``(S,)``, on the
    CPU; cu_seq_lens_q: their ends ``(S + 1,)``, in place of it; neither: one segment. As an argument they reach layers that are
    computed again in the backward pass, whatever other passes ran between."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    else:
        lengths = attention_mask.tolist()
    found = packed_attention(query[0], key[0], value[0], lengths, scale)
    return found.transpose(0, 1)[None], None


for _name in (_NAME, VARLEN):
    AttentionInterface.register(_name, _attend)


@contextmanager
def packed(model: nn.Module, name: str = _NAME) -> Iterator[None]:
    """While entered, attention of a transformers vision model stays within segments, whose lengths it takes as its attention mask
    (name `VARLEN`: whose ends it hands over itself).
    Where layers are computed again in the backward pass, it stays so until the next call."""
    modules: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    kept = [module.config for module in modules]
    for module in modules:
        own = copy.copy(module.config)
        own._attn_implementation_internal = name
        module.config = own
    recomputes = torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    try:
        yield
    finally:
        if not recomputes:
            for module, config in zip(modules, kept):
                module.config = config
