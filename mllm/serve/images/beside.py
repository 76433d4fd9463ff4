"""How does a server draw with a head that vLLM cannot run? With the model itself, beside the engine."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mllm.heads.codes.generate import generate_images, prompt_prefix, to_pil
from mllm.serve.images.api import ImagesRequest, drawing_seeds, images_body, picture_size, png_texts

_log = logging.getLogger("vllm.mllm")
_ROOM = 1.3
"""A model is put on the GPU when so many times its weights are free there."""


class ModelGenerator:
    """Draws with `generate_images`, one request after the other: heads with weights of their own (separate, depth, next_scale) read
    the language model's states at every step, which vLLM does not hand out. The whole model is read a second time; it stands on the
    GPU where it fits beside the engine, else on the CPU.
    """

    def __init__(self, checkpoint: str):
        from transformers import AutoProcessor

        from mllm.models.modeling_mllm import MllmForConditionalGeneration

        self.model = MllmForConditionalGeneration.from_pretrained(checkpoint, dtype="auto").eval()
        self.model.to(_device_for(self.model))
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        # A thread of its own: drawings that wait must not take those in which other requests' pictures are read.
        self._one = ThreadPoolExecutor(1, "drawing")
        _log.info("Drawings are made beside the engine, on %s", self.model.device)

    async def draw(self, client: Any, request: ImagesRequest) -> dict[str, Any]:
        """The answer's body, as `ImageGenerator.draw` gives it. client: not used. Raises `ConfigError` for what cannot be drawn."""
        size = picture_size(self.model.image_tokenizer, request)
        seeds = drawing_seeds(request)
        drawing = asyncio.get_running_loop().run_in_executor(self._one, self._draw, request, seeds)
        pictures, prompt_tokens, made = await drawing
        return images_body(pictures, seeds, size, prompt_tokens, made)

    def _draw(self, request: ImagesRequest, seeds: list[int]) -> tuple[list[str], int, int]:
        """Files in base64, tokens of the prompts, and codes drawn. A client that leaves takes its drawing out of those that wait; one
        that has begun is drawn to its end."""
        options = request.model_dump(include={"cfg_scale", "temperature", "top_k", "top_p"})
        drawn = generate_images(
            self.model,
            [request.prompt] * len(seeds),
            processor=self.processor,
            seed=seeds,
            batch_size=1,
            painting=request.painting(),
            **options,
        )
        prompt_tokens = len(prompt_prefix(self.processor, request.prompt, "prompt")) * (
            2 if request.cfg_scale != 1.0 else 1
        )
        codes = sum(tensor.numel() for tensor in drawn.codes.codes.values())
        return png_texts(to_pil(drawn.pixels)), prompt_tokens * len(seeds), codes


def _device_for(model: torch.nn.Module) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return "cuda" if torch.cuda.mem_get_info()[0] > _ROOM * needed else "cpu"
