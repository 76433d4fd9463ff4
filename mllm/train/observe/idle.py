"""Which parts that were to learn never got a gradient?

A connector in a run without pictures, a head whose rows are not in the data, an expert that is never chosen: the loss falls, and the
part is what it was. The optimizer's moments tell it under every engine: they are zero as long as every gradient was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mllm import distributed
from mllm.recipe import StageSpec
from mllm.train.engine.base import Engine, Fragment

AFTER = 64
"""Steps of a stage after which it is told a first time; a second time at its end."""
_MOMENTS = ("exp_avg_sq", "momentum_buffer", "absmax2", "state2")
"""Of AdamW, of SGD and Muon, of 8-bit AdamW (largest value of each block, or all values of a small tensor)."""


def idle_parts(engine: Engine) -> list[str]:
    """Parts that learn and whose moments are zero on all processes. All processes must call it."""
    part_of = getattr(engine.model, "part_of", None)
    if part_of is None:
        return []
    still: set[str] = set()
    moved: set[str] = set()
    with torch.no_grad():
        for fragment in engine.fragments():
            moment = _moment(fragment)
            if moment is not None:
                (moved if bool(moment.any()) else still).add(part_of(fragment.name))
    everywhere = distributed.gather_objects((still, moved))
    return sorted(set().union(*(still for still, _ in everywhere)) - set().union(*(moved for _, moved in everywhere)))


def _moment(fragment: Fragment) -> Tensor | None:
    """The fragment's moment; None where the optimizer keeps none."""
    moment: Any = next((fragment.state[key] for key in _MOMENTS if fragment.state.get(key) is not None), None)
    if not isinstance(moment, Tensor):
        return None
    whole = moment.reshape(-1)
    return whole[fragment.offset : fragment.offset + fragment.length] if moment.shape == fragment.like.shape else whole


def tell_idle(stage: StageSpec, parts: Iterable[str], step: int, display: Any) -> None:
    """Show them: clipping and decay had nothing to act on."""
    for part in parts:
        display.print(
            f"[yellow]! {stage.name}: {part} learned nothing, its gradient was zero in every step up to {step}: do the data use it (rows "
            "with images for encoders and connectors, rows with what it answers for a head)?"
        )
