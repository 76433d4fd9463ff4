"""Which requests make vLLM draw a picture, and which codes did it draw?"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from mllm.config import StrictModel
from mllm.errors import AlignmentError, ConfigError, UnavailableError
from mllm.heads.build import head_config
from mllm.heads.codes.build import empty_tokenizer
from mllm.heads.codes.configs import VocabularyHeadConfig
from mllm.heads.codes.generate import prompt_prefix, sample_seeds
from mllm.heads.codes.grammar import image_grammar, visual_tokens
from mllm.heads.codes.targets import drop_text
from mllm.processing.protocol import Processor
from mllm.visual_tokenizers.sequence import code_blocks

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig

KEY = "mllm_drawing"
"""Where `DrawingRequest` stands in ``SamplingParams.extra_args``."""
SCHEDULER = "mllm.serve.vllm.scheduler.PairScheduler"
"""For vLLM's ``scheduler_cls``, with ``async_scheduling=False``."""


NO_HEAD = "this model draws no images: none of its heads draws"


def refusal(config: MllmConfig) -> str | None:
    """Why vLLM cannot draw with a checkpoint of this config; None: it can."""
    if config.drawing_head is None:
        return NO_HEAD
    head = head_config(config.drawing_head)
    if not isinstance(head, VocabularyHeadConfig):
        return f"a {head.type} head: vLLM draws with a vocabulary head only; draw with `mllm draw`"
    return None


def pair_of(sampling: Any) -> str | None:
    """The name that the two requests of a guided drawing share, from ``SamplingParams``; None for any other request."""
    settings = (getattr(sampling, "extra_args", None) or {}).get(KEY)
    return settings["drawing"] if settings is not None and settings["cfg_scale"] != 1.0 else None


class DrawingRequest(StrictModel):
    """What `DrawingProcessor` must know of one request of a drawing."""

    drawing: str
    """Shared by the two requests of a guided pair, and by no other."""
    free: bool
    """Whether this is the request without the text."""
    ranges: list[tuple[int, int]] = Field(min_length=1)
    """Allowed ids [low, high) of each token."""
    broken: int
    cfg_scale: float = Field(default=1.0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0

    def codes(self) -> list[tuple[int, int]]:
        """The ranges at which something is drawn."""
        return [(low, high) for low, high in self.ranges if high - low > 1]


class BrokenDrawing(AlignmentError):
    """vLLM did not run a guided pair in step: one half came late or was aborted, or both do not fit into the engine."""


class DrawingPlan:
    """Writes a checkpoint's drawing requests and reads their answers.

    Raises `UnavailableError` for a model without a visual head or with one that vLLM cannot run.
    """

    def __init__(self, config: MllmConfig, processor: Processor):
        why = refusal(config)
        if why is not None:
            raise UnavailableError(why)
        self.processor, self.head = processor, head_config(config.drawing_head)
        self.null = self.head.tokens["null"]
        self.image_token_id = config.image_token_id
        assert config.visual_tokenizer is not None, "a model that draws has one"
        tokenizer = empty_tokenizer(config.visual_tokenizer, config.encoders)
        self.blocks, self.grammar = code_blocks(tokenizer), image_grammar(self.head, tokenizer)
        if any(block.size < 2 for block in self.blocks):
            raise UnavailableError("a codebook of one code cannot be drawn through vLLM; draw with `mllm draw`")

    def prompts(self, prompt: Any, guided: bool) -> list[list[int]]:
        """Ids of the prompt (text only) up to the image's start token; guided: and of the same without its text."""
        ids = prompt_prefix(self.processor, prompt, "prompt")
        if bool((ids == self.image_token_id).any()):
            raise ConfigError("prompt: drawing from pictures is not served; draw with `mllm draw --image`")
        if not guided:
            return [ids.tolist()]
        keep = visual_tokens(ids, self.head, self.grammar, self.image_token_id)
        start, first = torch.tensor([[0, len(ids) - 1]]), torch.zeros(1, dtype=torch.long)
        free, _ = drop_text(ids[None], start, first, self.null, keep[None])
        return [ids.tolist(), free[0].tolist()]

    def requests(self, prompt: Any, *, cfg_scale: float = 1.0, **options: Any) -> list[tuple[list[int], Any]]:
        """One or, guided, two (prompt ids, ``SamplingParams``) that draw one picture. options: temperature, top_k,
        top_p, seed."""
        from vllm import SamplingParams

        drawing, made = uuid.uuid4().hex, []
        for index, ids in enumerate(self.prompts(prompt, cfg_scale != 1.0)):
            request = DrawingRequest(
                drawing=drawing,
                free=bool(index),
                ranges=self.grammar.ranges,
                broken=self.null,
                cfg_scale=cfg_scale,
                **options,
            )
            sampling = SamplingParams(
                temperature=0,
                max_tokens=len(self.grammar.ranges),
                ignore_eos=True,
                stop_token_ids=[self.null],
                detokenize=False,
                extra_args={KEY: request.model_dump()},
            )
            made.append((ids, sampling))
        return made

    def read(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Generated ids of a drawing's requests → packed codes ``(S,)``. Raises `BrokenDrawing`."""
        first = list(answers[0])
        if any(list(answer) != first for answer in answers) or len(first) != len(self.grammar.ranges):
            raise BrokenDrawing(
                f"the drawing stopped after {len(first)} of {len(self.grammar.ranges)} tokens: its guided pair did not "
                "stay together in the engine; draw again, or give the engine more KV-cache memory or tokens at once "
                "(max_num_batched_tokens)"
            )
        image = self.grammar.read(torch.tensor([self.grammar.start_of_image, *first]))[0]
        return torch.cat([image[block.name] for block in self.blocks])


def draw_with_engine(
    llm: Any,
    plan: DrawingPlan,
    prompts: Sequence[Any],
    *,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Packed codes ``(B, S)`` of one picture per prompt from an offline vLLM engine; settings as `generate_images` takes
    them, and the same codes.

    llm: made with `mllm.heads.codes.settings.vllm_options` and ``scheduler_cls=SCHEDULER, async_scheduling=False``. Raises
    `BrokenDrawing`.
    """
    sets = [
        plan.requests(prompt, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=own)
        for prompt, own in zip(prompts, sample_seeds(seed, len(prompts)))
    ]
    flat = [request for requests in sets for request in requests]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in flat], [s for _, s in flat], use_tqdm=False)
    answers = iter([list(output.outputs[0].token_ids) for output in outputs])
    return torch.stack([plan.read([next(answers) for _ in requests]) for requests in sets])
