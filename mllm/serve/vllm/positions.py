"""How does vLLM learn where the tokens of a prompt stand, for a language model with several position axes (M-RoPE)? By the counting of
training and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mllm.models.configuration_mllm import MllmConfig
from mllm.models.position_axes import axes_of
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.positions import Shown
from mllm.processing.processor import APART


class PositionsOfPrompts:
    """vLLM's ``SupportsMRoPE``: what it asks a model whose language model has M-RoPE; of others it asks nothing."""

    supports_mrope: ClassVar[Literal[True]] = True
    config: MllmConfig
    rules: LayoutRules

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt.

        Args:
            input_tokens: its T ids.
            mm_features: its pictures and videos, as vLLM holds them.

        Returns:
            ``(3, T)``, and how far positions are ahead of the tokens' number behind it.

        Raises:
            AlignmentError: placeholders and visuals do not go together.
        """
        axes = axes_of(self.config, self.rules)
        assert axes is not None, "vLLM asks this of language models with several axes"
        text = np.arange(len(input_tokens))
        places = np.flatnonzero(np.asarray(input_tokens) == self.config.image_token_id)
        shown = [self._shown(feature.data) for feature in sorted(mm_features, key=lambda one: one.mm_position.offset)]
        found, ahead = axes.of_row(text, places, shown)
        return torch.from_numpy(np.ascontiguousarray(found)), ahead

    def _shown(self, item: Any) -> Shown:
        """A picture or a video as its fields tell it."""
        if APART + VIDEO_TIMES in item:
            times = tuple(int(time) for time in item[APART + VIDEO_TIMES].data.flatten().tolist() if time >= 0)
            return Shown(self.rules.video_layout(len(times)), times)
        sizes = item[IMAGE_SIZES].data.reshape(1, -1) if self.rules.needs_size else None
        return Shown(self.rules.layouts(sizes, 1)[0])
