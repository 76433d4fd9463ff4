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

    def __call__(self, step: int, *, last: bool) -> Path | None:
        """Draw if it is time to; returns the file."""
        spec = self.spec
        if spec is None or not (last or step % spec.every == 0):
            return None
        from mllm.heads.codes.generate import generate_images, side_by_side
        from mllm.visual_tokenizers.painting import Painting

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
            painting=Painting("plain"),  # it is the codes that learn, and diffusion costs a run of its own
        )
        torch.set_rng_state(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stage.name}-{step:06d}.png"
        side_by_side(drawn.pil()).save(path)
        if self.tracker is not None:
            self.tracker.log_images(f"{self.stage.name}/drawings", drawn.pixels, step=step)
        return path
