"""How does a layer know when a frame is shown (PVC, arXiv 2412.09613)?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SCALE = 1000.0
"""Times from 0 to 1 are spread over as many units as diffusion's steps, for which these sines were made."""


def relative_times(counts: Sequence[int]) -> Tensor:
    """When each of successive frames is shown, from 0 (a visual's first) to 1 (its last) ``(Σcounts,)``, fp32.

    counts: frames of each visual; one alone is shown at 0.
    """
    parts = [torch.linspace(0.0, 1.0, count) if count > 1 else torch.zeros(count) for count in counts]
    return torch.cat(parts) if parts else torch.zeros(0)


class TimedNorm(nn.Module):
    """Layer norm whose scale and shift depend on the time (AdaLN): sines of the time, then an MLP that starts at zero, so that it starts
    as a plain layer norm."""

    def __init__(self, width: int, time_width: int = 256):
        super().__init__()
        self.width, self.time_width = width, time_width
        self.inner, self.outer = nn.Linear(time_width, time_width), nn.Linear(time_width, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """x ``(V, N, C)``; times ``(V,)`` in fp32 → ``(V, N, C)``."""
        half = self.time_width // 2
        steps = torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times[:, None] * _SCALE * torch.exp(-math.log(10000.0) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
        scale, shift = self.outer(nn.functional.silu(self.inner(waves)))[:, None].chunk(2, dim=-1)
        return nn.functional.layer_norm(x, (self.width,)) * (1 + scale) + shift
