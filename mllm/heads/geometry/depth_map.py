"""Does training on depth teach a model how far things are? From each visual token's hidden state the head tells the depth of what the token
shows. It teaches while the model trains and does nothing else: answers, evaluation and serving never run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadModel, HeadParts, Reading, Step
from mllm.heads.geometry.frames import LaidFrames, frame_states, lay_frames, rows_of_sets, rules_of
from mllm.processing.frames import VideoSpec
from mllm.processing.layout import VIDEO_TIMES, LayoutRules
from mllm.types import ImageSpec, ViewLayout


class DepthMapHeadConfig(HeadConfig):
    """How far what each token shows is; rows give ``depths``."""

    type: Literal["depth_map"] = "depth_map"
    cells: int = Field(default=4, ge=1)
    """A token tells the depth of cells × cells places."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the layer between; default: the language model's."""
    scale: Literal["metric", "free"] = "metric"
    """free: what one factor for all frames of a video (of a picture) would mend does not count, for depth whose unit is not known."""
    gradient: float = Field(default=1.0, ge=0)
    """Weight of the loss on steps between neighbouring places, beside that on the depth itself."""
    weight: float = Field(default=1.0, ge=0)
    """Of both beside the words' loss."""


@HEADS.register("depth_map")
class DepthMapHead(Head):
    """Hidden states of visual tokens → the logarithm of the depth in metres."""

    Config = DepthMapHeadConfig
    config: DepthMapHeadConfig
    targets = ("target_depths",)
    reads_video = True
    zero3 = True

    def __init__(self, config: DepthMapHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        view = rules_of(parts, "depth_map").view
        if not view.in_place or view.leading + view.grid[0] * (view.grid[1] + view.row_separators) != view.num_tokens:
            raise ConfigError(
                "heads: depth_map needs visual tokens that are a map of the picture; use connector mlp, pixel_shuffle, average_pool or "
                "spatial_mllm"
            )
        self.view, hidden = view, config.hidden or parts.width
        self.norm = nn.LayerNorm(parts.width)
        self.tell = nn.Sequential(
            nn.Linear(parts.width, hidden), nn.GELU(), nn.Linear(hidden, view.frames * config.cells**2)
        )

    @staticmethod
    def size(config: DepthMapHeadConfig, view: ViewLayout) -> tuple[int, int]:
        """(rows, columns) of the maps that it learns."""
        return view.grid[0] * config.cells, view.grid[1] * config.cells

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        view = ViewLayout(num_tokens=4, grid=(2, 2))
        rules = LayoutRules(view, {"eye": ImageSpec(height=8, width=8)}, video=VideoSpec(frames=3))
        return {"type": cls.name, "cells": 2}, HeadParts(32, rules=rules)

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        ids = torch.tensor([1, *[4] * 12, 5, 6]).repeat(batch, 1)  # 4: TinyModel's placeholder; 3 frames of 4 tokens
        depths = torch.linspace(0.5, 5.0, batch * 3 * 16).view(batch * 3, 4, 4)
        depths[0, 0, 0] = torch.nan
        times = torch.tensor([[0, 500, 1000]] * batch)
        return Step(ids, ids.clone(), inputs={VIDEO_TIMES: times}), {"target_depths": depths}

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> LaidFrames | None:
        return lay_frames(model, step, targets["target_depths"], "target_depths")

    def count(self, inputs: Mapping[str, Any]) -> Any:
        depths = inputs.get(self.targets[0])
        return 0 if depths is None else (depths > 0).logical_and(depths.isfinite()).sum()

    def losses(self, model: HeadModel, step: Step, laid: LaidFrames, reading: Reading) -> HeadLoss:
        states = frame_states(reading.hidden, step, model.config.image_token_id, laid)
        places = rows_of_sets(laid, self.view.frames)
        told = self.maps(states)[[place[0] for place in places], [place[1] for place in places]].float()
        rows = torch.tensor([place[2] for place in places])
        wanted = laid.targets.to(told.device)[rows.to(told.device)].float().log()
        known = wanted.isfinite()
        off = torch.where(known, told - torch.where(known, wanted, 0.0), 0.0)
        if self.config.scale == "free":
            ends = torch.tensor(laid.frames).cumsum(0)
            off = without_a_factor(off, known, torch.searchsorted(ends, rows, right=True).tolist())
        parts = {"log": off.abs().sum() / known.sum(), "gradient": steps_off(off, known)}
        loss = parts["log"] + self.config.gradient * parts["gradient"]
        report = {name: value.detach() for name, value in parts.items()}
        return HeadLoss(step.share() * self.config.weight * loss + self.idle(), report)

    def maps(self, states: Tensor) -> Tensor:
        """States ``(S, M, L)`` of sets of tokens → log depth ``(S, frames of a set, rows, columns)``."""
        view, cells = self.view, self.config.cells
        lines = states[:, view.leading :].unflatten(1, (view.grid[0], -1))[:, :, : view.grid[1]]
        told = self.tell(self.norm(lines.to(self.norm.weight.dtype)))
        told = told.unflatten(-1, (view.frames, cells, cells))  # sets, rows, columns, frames, down, across
        return told.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def without_a_factor(off: Tensor, known: Tensor, visuals: list[int]) -> Tensor:
    """What log depths ``(F, rows, columns)`` are off, less the mean of each visual. visuals: the number of each frame's."""
    owner = torch.tensor(visuals, device=off.device)
    sums = off.new_zeros(int(owner.max()) + 1).index_add(0, owner, off.sum((1, 2)))
    counts = off.new_zeros(len(sums)).index_add(0, owner, known.sum((1, 2)).to(off))
    return torch.where(known, off - (sums / counts.clamp(min=1))[owner, None, None], 0.0)


def steps_off(off: Tensor, known: Tensor) -> Tensor:
    """Mean absolute difference of what neighbouring places ``(F, rows, columns)`` are off, where both are known: an edge in the wrong place
    costs, a wrong distance of the whole does not. 0 where no two neighbours are known."""
    pairs = [
        ((off[:, 1:] - off[:, :-1]).abs(), known[:, 1:] & known[:, :-1]),
        ((off[:, :, 1:] - off[:, :, :-1]).abs(), known[:, :, 1:] & known[:, :, :-1]),
    ]
    total = sum((difference * both).sum() for difference, both in pairs)
    count = sum(both.sum() for _, both in pairs)
    return torch.as_tensor(total) / torch.as_tensor(count).clamp(min=1)
