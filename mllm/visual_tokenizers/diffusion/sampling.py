"""How does noise become a picture, step by step, the same for the same seed?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.conditioning import Conditions

Denoiser = Callable[[Tensor, Tensor, Conditions], Tensor]
"""Noisy ``(n, C, H, W)``, times ``(n,)``, conditions → what the network tells ``(n, C, H, W)``."""


def generators(seed: int | Sequence[int], number: int) -> list[torch.Generator]:
    """One generator a picture, on the CPU, so that no device and no other picture of the batch changes what is drawn. A single seed
    is every picture's own. Raises `ConfigError` for another number of seeds than pictures."""
    seeds = [seed] * number if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != number:
        raise ConfigError(f"seed: {len(seeds)} seeds for {number} pictures; give one for each, or a single one for all")
    return [torch.Generator().manual_seed(s) for s in seeds]


def draw_noise(sources: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """``(B, *shape)`` float32: each picture's noise from its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources]).to(device)


def guided(denoise: Denoiser, noisy: Tensor, time: Tensor, conditions: Conditions, guidance: float) -> Tensor:
    """What the network tells, away from what it would tell without conditions: ``u + g (c - u)``. Both halves in one batch, the
    unconditional one first (ILLUME+); at guidance 1 only the conditional one is computed."""
    if guidance == 1.0:
        return denoise(noisy, time.expand(len(noisy)), conditions)
    both = denoise(torch.cat([noisy, noisy]), time.expand(2 * len(noisy)), conditions.without().joined(conditions))
    without, with_them = both.chunk(2)
    return without + guidance * (with_them - without)


def sample(
    denoise: Denoiser,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    *,
    guidance: float = 1.0,
    sources: Sequence[torch.Generator] | None = None,
    between: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Denoise by a scheduler of `diffusers`, set to its steps.

    Args:
        denoise: the network.
        scheduler: fresh, after ``set_timesteps``.
        noise: unit Gaussian ``(B, C, H, W)``.
        conditions: of the same B pictures.
        guidance: scale of classifier-free guidance; 1 is none.
        sources: generators of samplers that draw noise at every step.
        between: changes what a step made, given the next step's time (None after the last).

    Returns:
        The last step's ``(B, C, H, W)``.
    """
    current = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    takes = {"generator": list(sources)} if sources is not None and _takes_generator(scheduler) else {}
    times = scheduler.timesteps
    for place, time in enumerate(times):
        seen = scheduler.scale_model_input(current, time) if hasattr(scheduler, "scale_model_input") else current
        told = guided(denoise, seen, torch.as_tensor(time, device=noise.device), conditions, guidance)
        current = scheduler.step(told.to(current.dtype), time, current, return_dict=False, **takes)[0]
        if between is not None:
            current = between(current, times[place + 1] if place + 1 < len(times) else None)
    return current


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
