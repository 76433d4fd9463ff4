"""Which hidden states are a frame's own, and which rows of the targets are its?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.base import HeadModel, HeadParts, Step
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.types import VisualLayout


@dataclass
class LaidFrames:
    """targets ``(ΣF, …)``: a row for each frame of a video and for each picture, NaN where nothing is known; frames: how many rows each
    visual has (a picture one); sets: how many sets of tokens; video: whether it is a video."""

    targets: Tensor
    frames: list[int]
    sets: list[int]
    video: list[bool]


def rules_of(parts: HeadParts, head: str) -> LayoutRules:
    """How the model of a head that reads single frames lays its visuals out. Raises `ConfigError` where frames have no tokens of their
    own there, or are seen in several views."""
    rules = parts.rules
    if rules is None:
        raise ConfigError(f"heads: {head} learns from what is seen, and this model sees nothing (it has no connector)")
    if rules.views.type != "single":
        raise ConfigError(
            f"heads: {head} reads frames that are seen once and whole; leave model.views out (it is {rules.views.type})"
        )
    if rules.view.fast is not None:
        raise ConfigError(
            f"heads: {head} reads the tokens of each frame, and this connector puts means of frames into the sequence; use mlp, "
            "average_pool, spatial_mllm, merv or pvc"
        )
    return rules


def lay_frames(model: HeadModel, step: Step, targets: Tensor, name: str) -> LaidFrames | None:
    """The frames of a batch with their targets; None where nothing is known of any. Raises `AlignmentError` for targets of other frames."""
    assert step.input_ids is not None
    sizes, times = step.inputs.get(IMAGE_SIZES), step.inputs.get(VIDEO_TIMES)
    layouts = model.model.visual_layouts(sizes, times)
    if layouts is None:
        places = int((step.input_ids == model.config.image_token_id).sum())
        layouts = [VisualLayout(())] * len(model.model.tokens_of_images(places, None))
    frames = [layout.frames or 1 for layout in layouts]
    if sum(frames) != len(targets):
        raise AlignmentError(
            f"{name}: {len(targets)} rows for {len(layouts)} images and videos of {sum(frames)} frames; was the batch made by this "
            "model's own processor?"
        )
    if not targets.isfinite().any():
        return None
    sets = [sum(not block.ids for block in layout.blocks) or 1 for layout in layouts]
    return LaidFrames(targets, frames, sets, [layout.frames > 0 for layout in layouts])


def frame_states(hidden: Tensor, step: Step, image_token_id: int, laid: LaidFrames) -> Tensor:
    """hidden ``(B, T, L)`` → the states of each set of visual tokens ``(S, M, L)``, in the order of the sequence."""
    assert step.input_ids is not None
    states = hidden[(step.input_ids == image_token_id).to(hidden.device)]
    return states.unflatten(0, (sum(laid.sets), -1))


def rows_of_sets(laid: LaidFrames, together: int) -> Sequence[tuple[int, int, int]]:
    """(set of tokens, place in it, row of the targets) of every frame that a set of tokens shows. together: frames of a set; a picture
    that is shown several times has one row for all."""
    found, at, row = [], 0, 0
    for frames, sets, video in zip(laid.frames, laid.sets, laid.video, strict=True):
        for number in range(sets):
            for place in range(together):
                frame = number * together + place if video else 0
                if frame < frames:
                    found.append((at + number, place, row + frame))
        at, row = at + sets, row + frames
    return found
