"""How is a code drawn from logits: guidance and filters?"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.errors import ConfigError


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance ``u + s · (c - u)``: s = 1 is the conditional logits, 0 the unconditional ones.

    TokenFlow and Show-o write ``(1 + t) c - t u``, which is s = 1 + t. ILLUME+ applies the same to log-probabilities.
    """
    return unconditional + scale * (conditional - unconditional)


def scale_from_offset(offset: float) -> float:
    """Our guidance scale for TokenFlow's and Show-o's ``t``."""
    return 1.0 + offset


def next_scale_guidance(offset: float, index: int, num_scales: int) -> float:
    """TokenFlow's guidance at scale number ``index``: ``t`` grows linearly from 0 to ``offset``; returned as our
    scale."""
    return scale_from_offset(offset * index / max(1, num_scales - 1))


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits ``(…, V)`` with everything but the ``top_k`` largest, then everything outside the smallest set that holds
    ``top_p`` of what is left, at -inf. 0 turns a filter off (as do k ≥ V and p ≥ 1); the largest always stays."""
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ConfigError(f"top_k {top_k} must be 0 or more and top_p {top_p} between 0 and 1")
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if 0 < top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=False)
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Ids ``(…)`` drawn from logits ``(…, V)``; temperature 0 takes the largest.

    uniform ``(…)`` in [0, 1): the draw is where the cumulated probabilities pass it, so what is drawn depends on these
    numbers alone, not on the other samples of a batch; without it, ``generator`` draws.
    """
    if temperature < 0:
        raise ConfigError(f"temperature {temperature} must be 0 or more")
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    weights = filter_logits(logits.float() / temperature, top_k=top_k, top_p=top_p).softmax(-1)
    if uniform is not None:
        cumulated = weights.double().cumsum(-1)
        passed = cumulated <= uniform.to(cumulated)[..., None] * cumulated[..., -1:]
        # Rounding may pass the last code that has any weight; a code without weight is never drawn.
        last = torch.where(weights > 0, torch.arange(weights.shape[-1], device=weights.device), 0).amax(-1)
        return torch.minimum(passed.sum(-1), last)
    return torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])
