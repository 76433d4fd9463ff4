"""What is the learning rate at this step? A pure function of the step, so resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from mllm.recipe import ScheduleSpec

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Name → shape after the warm-up: progress in [0, 1] → share of the peak above the minimum."""


def warmup_steps(spec: ScheduleSpec, total_steps: int) -> int:
    """Steps of linear warm-up: a share of the stage below 1, a number of steps from 1 on."""
    steps = math.ceil(spec.warmup * total_steps) if spec.warmup < 1 else int(spec.warmup)
    return min(steps, total_steps)


def rate_factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """Share of the peak rate that optimizer step ``step`` (from 0) uses. The warm-up's first step is 1/warmup, not
    0."""
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return spec.minimum + (1 - spec.minimum) * SCHEDULES[spec.type](progress)
