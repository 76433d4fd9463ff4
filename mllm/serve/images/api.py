"""What answers ``POST /v1/images/generations``? Drawings through the server's own engine, decoded beside it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import random
import time
import uuid
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mllm.config import StrictModel
from mllm.errors import ConfigError, MllmError, UnavailableError
from mllm.heads.codes.build import resolved_settings
from mllm.heads.codes.generate import to_pil
from mllm.models.weight_files import present_name, published_renamings, read_part
from mllm.recipe import reader_of
from mllm.serve.images.requests import BrokenDrawing, DrawingPlan
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.diffusion.carried import attach
from mllm.visual_tokenizers.painting import DecoderName, Painting
from mllm.visual_tokenizers.sequence import decode_packed

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig

ATTEMPTS = 3
"""How often a guided pair that came apart (one half was late) is drawn again."""


class ImagesRequest(StrictModel):
    """OpenAI's image request, and our settings of drawing: those of `generate_images`, under the same names.

    Of OpenAI's own settings those values pass that change nothing here; another one is refused, not ignored.
    """

    prompt: str = Field(min_length=1, max_length=32_000)
    model: str | None = None
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    quality: Literal["auto", "standard"] | None = None
    style: Literal["natural"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    user: str | None = None
    cfg_scale: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    top_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    decoder: DecoderName = "auto"
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)

    def painting(self) -> Painting:
        """By which decoder the codes become pixels."""
        return Painting(self.decoder, self.steps, self.guidance)


class Busy(MllmError):
    """The engine could not keep a guided pair together, several times."""


class ImageGenerator:
    """Draws with a server's engine: prompts → requests → codes → pictures. Reads the tokenizer's weights, no others."""

    def __init__(self, checkpoint: str):
        from transformers import AutoConfig, AutoProcessor

        config: Any = AutoConfig.from_pretrained(checkpoint)
        self.plan = DrawingPlan(config, AutoProcessor.from_pretrained(checkpoint))
        self.image_tokenizer = _load_tokenizer(config, checkpoint)

    async def draw(self, client: Any, request: ImagesRequest) -> dict[str, Any]:
        """The answer's body. client: vLLM's ``AsyncLLM``. Raises `ConfigError` for what cannot be drawn and `Busy`."""
        size = picture_size(self.image_tokenizer, request)
        seeds = drawing_seeds(request)
        drawn = await _together(self._draw_one(client, request, seed) for seed in seeds)
        packed = torch.stack([codes for codes, _, _ in drawn])
        pictures = await asyncio.to_thread(self._paint, packed, request.painting(), seeds)
        prompt_tokens, made = (sum(count[place] for count in drawn) for place in (1, 2))
        return images_body(pictures, seeds, size, prompt_tokens, made)

    async def _draw_one(self, client: Any, request: ImagesRequest, seed: int) -> tuple[Tensor, int, int]:
        """Codes ``(S,)``, prompt tokens, drawn tokens."""
        settings = request.model_dump(include={"cfg_scale", "temperature", "top_k", "top_p"})
        for _ in range(ATTEMPTS):
            requests = self.plan.requests(request.prompt, seed=seed, **settings)
            check_room(getattr(client, "vllm_config", None), [(len(ids), s.max_tokens) for ids, s in requests])
            name = uuid.uuid4().hex
            options = _one_engine(client, seed)
            answers = await _together(
                _answer(client, ids, sampling, f"draw-{name}-{index}", options)
                for index, (ids, sampling) in enumerate(requests)
            )
            with contextlib.suppress(BrokenDrawing):
                codes = self.plan.read(answers)
                return codes, sum(len(ids) for ids, _ in requests), sum(len(answer) for answer in answers)
        raise Busy(
            "the engine is too busy to keep the two halves of a guided drawing together; try again later, or with cfg_scale 1"
        )

    def _paint(self, packed: Tensor, painting: Painting, seeds: list[int]) -> list[str]:
        """Codes ``(n, S)`` → PNG files in base64."""
        rows = zip(packed.split(1), seeds)
        return [png_texts(to_pil(decode_packed(self.image_tokenizer, row, painting, [seed])))[0] for row, seed in rows]


def picture_size(tokenizer: VisualTokenizer, request: ImagesRequest) -> str:
    """What a request's pictures are, as OpenAI writes it. Raises `ConfigError` for another size, or a decoder that is not there."""
    rows, columns = request.painting().size(tokenizer)
    size = f"{columns}x{rows}"
    if request.size not in (None, "auto", size):
        raise ConfigError(f"size {request.size}: this model draws {size}")
    return size


def drawing_seeds(request: ImagesRequest) -> list[int]:
    """A seed for every picture. OpenAI's clients expect other pictures at every call; the seed that was used is in the answer."""
    first = random.SystemRandom().randrange(2**53) if request.seed is None else request.seed
    return [first + number for number in range(request.n)]


def images_body(pictures: list[str], seeds: list[int], size: str, prompt_tokens: int, made: int) -> dict[str, Any]:
    """An answer in OpenAI's form. pictures: PNG files in base64; asked, made: tokens of prompts and drawings."""
    return {
        "created": int(time.time()),
        "size": size,
        "output_format": "png",
        "data": [{"b64_json": picture, "seed": seed} for picture, seed in zip(pictures, seeds)],
        "usage": {"input_tokens": prompt_tokens, "output_tokens": made, "total_tokens": prompt_tokens + made},
    }


def png_texts(pictures: Iterable[Any]) -> list[str]:
    """Pictures as PNG files in base64."""
    texts = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def check_room(engine: Any, requests: list[tuple[int, int]]) -> None:
    """Raise `ConfigError` for a drawing that an engine can never hold. engine: vLLM's config, as far as it is known;
    requests: tokens of the prompt and of the drawing, twice for a guided one."""
    known = lambda part, name: getattr(getattr(engine, part, None), name, None)  # noqa: E731
    needed, limit = sum(requests[0]), known("model_config", "max_model_len")
    if limit and needed > limit:
        raise ConfigError(f"prompt: with its drawing it has {needed} tokens, above this server's limit of {limit}")
    if len(requests) < 2:
        return
    unguided = "shorten it, or draw with cfg_scale 1"
    read, step = sum(prompt for prompt, _ in requests), known("scheduler_config", "max_num_batched_tokens")
    if step and read > step:
        raise ConfigError(f"prompt: guided, it has {read} tokens, and this server reads {step} at once; {unguided}")
    blocks, size = known("cache_config", "num_gpu_blocks"), known("cache_config", "block_size")
    if blocks and size:
        usable = blocks // (known("parallel_config", "data_parallel_size") or 1) - 1  # vLLM keeps one to itself
        wanted = sum(-(-(prompt + drawn) // size) for prompt, drawn in requests)
        if wanted > usable:
            raise ConfigError(
                f"prompt: a guided drawing of it fills {wanted} blocks of the KV cache, and this server has {usable}; "
                + unguided
            )


async def _together(parts: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What all of them give; when one fails, or the client goes away, the others are cancelled."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _answer(client: Any, ids: list[int], sampling: Any, name: str, options: dict[str, Any]) -> list[int]:
    """The generated ids of one engine request; cancelling aborts it."""
    last = None
    async for output in client.generate({"prompt_token_ids": ids}, sampling, name, **options):
        last = output
    if last is None:
        raise UnavailableError("the engine gave no answer")
    return list(last.outputs[0].token_ids)


def _one_engine(client: Any, seed: int) -> dict[str, Any]:
    """With several data-parallel engines, both halves of a pair go to the same one."""
    parallel = getattr(getattr(client, "vllm_config", None), "parallel_config", None)
    engines = getattr(parallel, "data_parallel_size", 1)
    return {"data_parallel_rank": seed % engines} if engines > 1 else {}


def _load_tokenizer(config: MllmConfig, checkpoint: str) -> VisualTokenizer:
    """The visual tokenizer that a checkpoint draws with: its own, or the one inside an encoder."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(checkpoint))
    assert config.visual_tokenizer is not None
    owner = reader_of(config.visual_tokenizer)
    prefix = "model.visual_tokenizer." if owner is None else f"model.vision_tower.encoders.{owner}.tokenizer."
    tokenizer = build_tokenizer(resolved_settings(config.visual_tokenizer, config.encoders))
    renamings = published_renamings(tokenizer)
    weights = {present_name(name, renamings): tensor.float() for name, tensor in read_part(folder, prefix).items()}
    missing, foreign = tokenizer.load_state_dict(weights, strict=False)
    if missing or foreign:
        raise ConfigError(
            f"{checkpoint}: visual tokenizer weights missing {missing[:5]}, without a place {foreign[:5]}"
        )
    attach(tokenizer, folder)
    return tokenizer.eval()
