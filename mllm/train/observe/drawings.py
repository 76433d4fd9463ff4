"""What does the model draw while it trains?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm import distributed
from mllm.processing.protocol import Processor
from mllm.recipe import DrawSpec, StageSpec

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.painting import Painting


class Drawings:
    """Draws a stage's prompts every so often, on the main process: ``<output>/drawings/<stage>-<step>.png`` (one picture
    per prompt, side by side) and TensorBoard. Changes neither the model's modes nor the random state, so training goes on
    as if nothing had been drawn."""

    def __init__(
        self, output: Path, stage: StageSpec, model: MllmForConditionalGeneration, processor: Processor, tracker: Any
    ):
        self.folder, self.stage, self.model, self.processor, self.tracker = (
            output / "drawings",
            stage,
            model,
            processor,
            tracker,
        )
        self.spec: DrawSpec | None = stage.draw if distributed.is_main() else None
        self.painting = None if self.spec is None else _painting(self.spec, model.image_tokenizer)

    def __call__(self, step: int, *, last: bool) -> Path | None:
        """Draw if it is time to; returns the file."""
        spec = self.spec
        if spec is None or not (last or step % spec.every == 0):
            return None
        from mllm.heads.codes.generate import generate_images, side_by_side

        state = torch.get_rng_state()
        drawn = generate_images(
            self.model,
            spec.prompts,
            processor=self.processor,
            cfg_scale=spec.cfg_scale,
            temperature=spec.temperature,
            top_k=spec.top_k,
            top_p=spec.top_p,
            seed=spec.seed,
            painting=self.painting,
        )
        torch.set_rng_state(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stage.name}-{step:06d}.png"
        side_by_side(drawn.pil()).save(path)
        if self.tracker is not None:
            self.tracker.log_images(f"{self.stage.name}/drawings", drawn.pixels, step=step)
        return path


def _painting(spec: DrawSpec, tokenizer: VisualTokenizer) -> Painting:
    """By which decoder a stage's drawings become pixels. Raises `ConfigError`, before the stage trains, for a decoder that is not
    there."""
    from mllm.visual_tokenizers.painting import Painting

    learns = any(parameter.requires_grad for parameter in tokenizer.parameters())  # away from the codes of its decoder
    painting = Painting("plain" if spec.decoder == "auto" and learns else spec.decoder, spec.steps, spec.guidance)
    painting.by_diffusion(tokenizer)
    return painting
