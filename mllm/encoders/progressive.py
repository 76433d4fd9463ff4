"""How does a ViT see a frame in the light of the frames before it (PVC, arXiv 2412.09613)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllm.encoders.base import EncoderConfig
from mllm.encoders.hf import HfConfig, HfEncoder
from mllm.encoders.hf_models import vision_config
from mllm.encoders.library import block_prefixes, find_blocks, group_parameters
from mllm.errors import ConfigError
from mllm.timed import TimedNorm, relative_times
from mllm.types import Grid, VisionFeatures


class ProgressiveConfig(HfConfig):
    """A ViT of transformers, as `HfConfig`, whose last blocks look back in time."""

    temporal_layers: int = Field(default=12, ge=1)
    """The last so many blocks get an attention over time before their own."""
    time_width: int = Field(default=256, ge=2, multiple_of=2)
    """Width of the time's embedding."""


@dataclass(frozen=True)
class Scenes:
    """Which rows of a batch are frames of one visual. groups: row numbers ``(S, T)`` of visuals with T frames each; times ``(V,)``."""

    groups: tuple[Tensor, ...]
    times: Tensor


def scenes_of(scene_ids: Tensor | None, count: int, device: torch.device) -> Scenes:
    """Rows that follow one another with the same id are one visual's frames; None: each row is one by itself."""
    lengths = [1] * count
    if scene_ids is not None:
        lengths = torch.unique_consecutive(scene_ids.cpu(), return_counts=True)[1].tolist()
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    groups = tuple(
        torch.tensor([list(range(s, s + n)) for s, n in zip(starts, lengths) if n == length], device=device)
        for length in dict.fromkeys(lengths)
    )
    return Scenes(groups, relative_times(lengths).to(device))


class TemporalAttention(nn.Module):
    """Every token attends to the tokens at its place in the frames up to its own; the result starts at zero."""

    def __init__(self, width: int, num_heads: int, time_width: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = TimedNorm(width, time_width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, scenes: Scenes) -> Tensor:
        """``(V, N, C)`` → ``(V, N, C)``, the input included."""
        number, width = x.shape[1:]
        triples = self.query_key_value(self.norm(x, scenes.times))
        read = torch.zeros_like(x)
        for rows in scenes.groups:
            visuals, frames = rows.shape
            parts = triples[rows].transpose(1, 2).reshape(visuals * number, frames, 3, self.num_heads, -1)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            found = found.transpose(1, 2).reshape(visuals, number, frames, width).transpose(1, 2)
            read = read.index_copy(0, rows.flatten(), found.flatten(0, 1))
        return x + self.out(read)


class ProgressiveEncoder(HfEncoder):
    """`HfEncoder` that sees the frames of a visual together, each in the light of those before it. It starts as the ViT alone."""

    Config: ClassVar[type[EncoderConfig]] = ProgressiveConfig
    config: ProgressiveConfig
    joins_views = True

    def __init__(self, config: ProgressiveConfig):
        super().__init__(config)
        _, found = find_blocks(self.model)
        assert found is not None
        blocks = list(found.children())
        if self.config.temporal_layers > len(blocks):
            raise ConfigError(
                f"temporal_layers: {self.config.temporal_layers} of {len(blocks)} blocks that run; give at most {len(blocks)}"
            )
        architecture = vision_config(self.config.known_architecture)
        width, heads = (getattr(architecture, name, None) for name in ("hidden_size", "num_attention_heads"))
        if not isinstance(width, int) or not isinstance(heads, int):
            raise ConfigError(
                f"architecture: {architecture.model_type} is no plain ViT; use clip, siglip, dinov2 or internvl"
            )
        first = len(blocks) - self.config.temporal_layers
        self.temporal = nn.ModuleDict(
            {str(n): TemporalAttention(width, heads, self.config.time_width) for n in range(first, len(blocks))}
        )
        self._scenes: Scenes | None = None
        self._timed: list[Any] = blocks[first:]
        for number in range(first, len(blocks)):
            blocks[number].register_forward_pre_hook(partial(_look_back, self, str(number)), with_kwargs=True)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {**super().tiny(), "type": "progressive", "temporal_layers": 1, "time_width": 8}

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        places: Tensor | None = None,
        return_attention: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> VisionFeatures:
        if grids is not None:
            raise ConfigError("progressive encoder: takes frames of one size, not patches of any grid (views native)")
        self._scenes = scenes_of(scene_ids, len(pixels), pixels.device)
        try:
            return super().forward(pixels, return_attention=return_attention)
        finally:
            self._scenes = None

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        super().set_gradient_checkpointing(enabled)
        for block in self._timed:
            block._gradient_checkpointing_func = self._checkpoint

    def _checkpoint(self, block: Any, *inputs: Any) -> Any:
        """A block computed again in the backward pass sees the frames of its own pass, whatever ran since."""
        scenes = self._scenes

        def run(*inputs: Any) -> Any:
            former, self._scenes = self._scenes, scenes
            try:
                return block(*inputs)
            finally:
                self._scenes = former

        return checkpoint(run, *inputs, use_reentrant=False)

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        blocks = [f"model.{prefix}" for prefix in block_prefixes(self.model)]
        groups = group_parameters([n for n, _ in self.named_parameters() if n.startswith("model.")], blocks)
        own = {f"layers.{number}": f"temporal.{number}." for number in self.temporal}
        return [(name, [*prefixes, own[name]] if name in own else prefixes) for name, prefixes in groups]


def _look_back(encoder: ProgressiveEncoder, number: str, block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a block: its tokens, with what they see in the frames before."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.ndim != 3:
        raise ConfigError(
            "architecture: its blocks give maps, not tokens; take a plain ViT (clip, siglip, dinov2, internvl)"
        )
    scenes = encoder._scenes or scenes_of(None, len(hidden), hidden.device)
    hidden = encoder.temporal[number](hidden, scenes)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
