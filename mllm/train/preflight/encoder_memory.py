"""How much do a model's encoders keep of a step for its backward pass?"""

from __future__ import annotations

from collections.abc import Collection

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import StageSpec
from mllm.types import VisualLayout


def kept_by_encoders(
    model: MllmForConditionalGeneration,
    stage: StageSpec,
    parts: Collection[str],
    visual: VisualLayout,
    per_channel: float,
    size: int,
) -> float:
    """Bytes that encoders keep of a micro-batch: of all blocks of one that learns, of one block of another.

    Args:
        model: perhaps on the meta device.
        stage: what is trained.
        parts: those that learn.
        visual: a row's picture or video.
        per_channel: bytes that a block keeps of a channel of a token.
        size: bytes of a number that the model computes with.
    """
    kept, native = 0.0, model.model.rules.native
    for name, info in model.config.encoder_infos().items():
        rows = visual.rows_of(name)
        places = rows if native else rows * info.num_tokens
        one = places * info.width * per_channel
        blocks: float = 1
        if f"encoders.{name}" in parts:
            groups = model.model.vision_tower.encoders[name].layer_groups()
            blocks = sum(1 for group, _ in groups if group.startswith("layers."))
            if stage.gradient_checkpointing:
                blocks = 1 + blocks * size * places * info.width / one  # of each what enters it, and one whole again
        kept += stage.batch_size * one * blocks
    return kept
