"""By which decoder do drawn codes become pixels?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm.errors import ConfigError
from mllm.types import Grid
from mllm.visual_tokenizers.base import VisualTokenizer

DecoderName = Literal["auto", "plain", "diffusion"]


@dataclass(frozen=True)
class Painting:
    """decoder: plain: the tokenizer's own; diffusion: the one trained beside it; auto: that where there is one. steps, guidance: of the
    diffusion decoder; None: as its config says."""

    decoder: DecoderName = "auto"
    steps: int | None = None
    guidance: float | None = None

    def by_diffusion(self, tokenizer: VisualTokenizer) -> bool:
        """Whether a tokenizer's codes are painted by diffusion. Raises `ConfigError` for settings that say nothing, or a decoder that is
        not there."""
        if self.decoder not in ("auto", "plain", "diffusion"):
            raise ConfigError(f"decoder {self.decoder!r}: one of auto, plain, diffusion is expected")
        if self.decoder == "diffusion" and not tokenizer.has_diffusion:
            raise ConfigError(
                "decoder diffusion: this checkpoint has none; train one by a stage of kind diffusion beside its visual tokenizer, before "
                "the model is built on it"
            )
        diffuses = self.decoder != "plain" and tokenizer.has_diffusion
        if not diffuses and (self.steps is not None or self.guidance is not None):
            raise ConfigError("steps and guidance are the diffusion decoder's, and the plain decoder paints here")
        return diffuses

    def size(self, tokenizer: VisualTokenizer) -> Grid:
        """Rows and columns of the pictures."""
        side = tokenizer.diffusion.image_side if self.by_diffusion(tokenizer) else None
        return (tokenizer.image.height, tokenizer.image.width) if side is None else (side, side)
