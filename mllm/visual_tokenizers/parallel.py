"""How are the codes of a picture drawn side by side: all at once, the least sure ones again (MaskGIT, arXiv 2202.04200; Show-o,
arXiv 2408.12528)?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mllm.errors import ConfigError
from mllm.visual_tokenizers.sampling import sample


def cosine_mask_ratio(progress: Tensor) -> Tensor:
    """Share of codes that is still open at a progress ``(…)`` of 0 to 1: ``cos(π t / 2)``."""
    return (progress * (math.pi / 2)).cos()


def least_sure(
    confidence: Tensor, number: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Which codes are opened again, bool ``(B, N)``: those less sure than the one at sorted place ``number``.

    Args:
        confidence: probability of each drawn code ``(B, N)``.
        number: how many are opened ``(B, 1)``, below N; fewer where several are equally sure.
        temperature: of Gumbel noise on the logarithms; 0: none.

    Raises:
        ConfigError: for a number that is not 0 to N - 1.
    """
    total = confidence.shape[-1]
    if number.numel() and not (int(number.min()) >= 0 and int(number.max()) < total):
        raise ConfigError(f"number: {number.flatten().tolist()} of {total} codes; 0 to {total - 1} is expected")
    sure = _log(confidence)
    if temperature:
        uniform = torch.rand(confidence.shape, generator=generator, device=confidence.device)
        sure = sure - temperature * _log(-_log(uniform))
    return sure < sure.sort(-1).values.gather(-1, number.long())


@torch.no_grad()
def generate_parallel(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    *,
    steps: int = 18,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw codes ``(B, N)`` in ``steps`` looks: each draws all that are open and opens the least sure of them again, fewer every time.

    Args:
        predict: codes ``(B, N)`` and which are open ``(B, N)`` → logits ``(B, N, V)``; open codes say nothing.
        shape: ``(B, N)``.
        steps: looks; 1 draws all at once.
        temperature, top_k, top_p: of a draw (`sample`); temperature 0 takes the largest.
        choice_temperature: of the noise on which codes are opened, falling to 0 with the steps.

    Raises:
        ConfigError: for fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}; 1 or more is expected")
    device = generator.device if generator is not None else None
    codes = torch.zeros(shape, dtype=torch.long, device=device)
    opened = torch.ones(shape, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = predict(codes, opened)
        codes, opened = codes.to(logits.device), opened.to(logits.device)
        drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        codes = torch.where(opened, drawn, codes)
        if step == steps - 1:
            break
        chance = logits.float().softmax(-1).gather(-1, codes[..., None])[..., 0]
        # What was settled before is surer than anything: it is never opened again.
        chance = torch.where(opened, chance, torch.inf)
        share = cosine_mask_ratio(torch.tensor((step + 1) / steps))
        still = opened.sum(1, keepdim=True)
        number = (share * shape[1]).floor().long().to(still).clamp(min=1).minimum(still - 1).clamp(min=0)
        opened = least_sure(
            chance, number, temperature=choice_temperature * (1 - (step + 1) / steps), generator=generator
        )
    return codes


def _log(value: Tensor) -> Tensor:
    return value.clamp_min(1e-20).log()
