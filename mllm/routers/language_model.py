"""How does the language model itself choose experts, by answering a question in letters (MoVA, arXiv 2404.13046)?"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError, did_you_mean
from mllm.routers import ROUTERS
from mllm.routers.base import Router, RouterConfig
from mllm.routers.gate import random_weights
from mllm.types import Grid, Routing

INSTRUCTION = (
    "Below is a pool of vision models, one per line: a letter, then what the model is good at. Which of them help to "
    "answer the question about the image? Reply with up to {top_k} letters, separated by commas, the most useful "
    "first. Reply none if no model helps."
)


class LanguageModelConfig(RouterConfig):
    """Routing as text: a lettered pool of capabilities in the prompt, letters in the answer."""

    type: str = "language_model"
    capabilities: dict[str, str]
    """Expert → one sentence on what it is good at; the prompt shows this, never the name."""
    top_k: int = Field(default=3, ge=1)
    grid: Grid | None = None
    """Rows and columns of the short image that the routing pass sees; default: half the model's own."""
    instruction: str = INSTRUCTION
    """Text before the pool; ``{top_k}`` is filled in."""
    explore: float = Field(default=0.0, ge=0, le=1)
    """In training, the share of images whose experts are a random set (1 to ``top_k``) where the data fix none. Otherwise no
    expert runs there: a forward pass asks nobody, so the data must say (``experts`` in a row, or routing labels)."""
    parser: Literal["strict", "lenient"] = "strict"
    """strict: letters of the pool separated by commas, or none; anything else is an error. lenient: as published, any
    capital letter of the pool anywhere before the third comma counts, words included."""

    @model_validator(mode="before")
    @classmethod
    def _fewer(cls, data: Any) -> Any:
        if isinstance(data, dict) and "top_k" not in data and isinstance(data.get("experts"), list) and data["experts"]:
            return {**data, "top_k": min(3, len(data["experts"]))}
        return data

    @model_validator(mode="after")
    def _described(self) -> LanguageModelConfig:
        if len(self.experts) > len(string.ascii_uppercase):
            raise ValueError(f"experts: {len(self.experts)} experts, but there are 26 letters; route fewer")
        for name in self.capabilities:
            if name not in self.experts:
                known = ", ".join(self.experts)
                raise ValueError(
                    f"capabilities: {name!r} is no expert{did_you_mean(name, self.experts)}. Experts: {known}"
                )
        for name in self.experts:
            if not self.capabilities.get(name, "").strip():
                raise ValueError(f"capabilities.{name} is missing: say in one sentence what this expert is good at")
        return self

    def letters(self) -> str:
        """The pool's letters in the experts' order: ``ABC…``"""
        return string.ascii_uppercase[: len(self.experts)]


@dataclass(frozen=True)
class RoutingAnswer:
    """A parsed answer. experts: positions in the pool, in the order named; error: why nothing could be read, else
    None."""

    experts: tuple[int, ...]
    error: str | None = None


def parse_answer(answer: str, num_experts: int, *, top_k: int) -> RoutingAnswer:
    """Read ``B, A`` or ``none``. Letters beyond ``top_k`` are dropped, repeated ones count once; anything else is
    reported in ``error`` and chooses no expert."""
    letters = string.ascii_uppercase[:num_experts]
    if answer.strip().lower() == "none":
        return RoutingAnswer(())
    items = [item.strip() for item in answer.split(",")]
    for item in items:
        if len(item) != 1 or item not in letters:
            return RoutingAnswer(
                (),
                f"routing answer {answer!r}: {item!r} is not one of {', '.join(letters)}; expected letters separated "
                f"by commas, or none",
            )
    return RoutingAnswer(tuple(letters.index(item) for item in dict.fromkeys(items))[:top_k])


def parse_answer_leniently(answer: str, num_experts: int, *, top_k: int = 3) -> RoutingAnswer:
    """The rule of MoVA's published code: an expert is chosen when its capital letter occurs anywhere in the text before
    comma number ``top_k``; words count (``None`` holds no letter from A to G, ``Cat`` chooses C). Never an error."""
    head = ",".join(answer.split(",")[:top_k])
    return RoutingAnswer(tuple(i for i, letter in enumerate(string.ascii_uppercase[:num_experts]) if letter in head))


def pool_routing_tokens(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Visual tokens ``(..., rows * cols, L)`` averaged to ``target`` for the routing pass (MoVA: 24×24 to 12×12)."""
    *lead, _, width = tokens.shape
    image = tokens.reshape(-1, *grid, width).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(image.float(), target).flatten(2).transpose(1, 2)
    return pooled.reshape(*lead, target[0] * target[1], width).to(tokens.dtype)


@ROUTERS.register("language_model")
class LanguageModelRouter(Router):
    """Two passes: `prompt` → the language model's answer → `decide` → routing. Has no parameters.

    In the first pass, before anything is decided, `forward` gives all-zero weights: no expert runs, as published. In training
    see ``explore``.
    """

    Config = LanguageModelConfig
    config: LanguageModelConfig
    asks_language_model = True

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], int, int]:
        capabilities = {"a": "Reads text in documents.", "b": "Finds small objects.", "c": "Understands charts."}
        return {"type": "language_model", "experts": list(capabilities), "capabilities": capabilities, "top_k": 2}, 6, 8

    def prompt(self, question: str) -> str:
        """Text of the routing request's user turn, to stand after the image."""
        config = self.config
        pool = [f"{letter}. {config.capabilities[name]}" for letter, name in zip(config.letters(), config.experts)]
        instruction = config.instruction.replace("{top_k}", str(config.top_k))
        return "\n".join([instruction, "", "Model pool:", *pool, "", "Question:", question])

    def parse(self, answer: str) -> RoutingAnswer:
        """Read one answer with the configured parser."""
        parse = parse_answer if self.config.parser == "strict" else parse_answer_leniently
        return parse(answer, len(self.config.experts), top_k=self.config.top_k)

    def target(self, experts: Sequence[str]) -> str:
        """The answer to train on for some experts: their letters in pool order, or ``none``. Raises `ConfigError`."""
        for name in experts:
            if name not in self.config.experts:
                raise ConfigError(f"routing target: {name!r} is no expert. Experts: {', '.join(self.config.experts)}")
        if len(set(experts)) > self.config.top_k:
            raise ConfigError(f"routing target: {len(set(experts))} experts, but top_k is {self.config.top_k}")
        letters = [letter for letter, name in zip(self.config.letters(), self.config.experts) if name in experts]
        return ", ".join(letters) or "none"

    def decide(
        self, answers: Sequence[str], allowed: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> tuple[Routing, list[RoutingAnswer]]:
        """Routing of B images from their answers, and each answer as parsed; look at ``error`` and report it: an answer
        that cannot be read runs no expert."""
        parsed = [self.parse(answer) for answer in answers]
        decisions = torch.zeros(len(answers), len(self.config.experts), device=device)
        for row, answer in enumerate(parsed):
            decisions[row, list(answer.experts)] = 1
        return self.forward(decisions, allowed=allowed, decisions=decisions), parsed

    def forward(
        self,
        summary: Tensor,
        text: Tensor | None = None,
        allowed: Tensor | None = None,
        *,
        decisions: Tensor | None = None,
    ) -> Routing:
        """decisions ``(B, E)``: non-zero where an expert was chosen; None: nothing is decided yet and no expert runs.
        Chosen experts share the weight equally."""
        open_experts = self.read_allowed(summary, allowed)
        if decisions is None:
            weights = torch.zeros_like(open_experts, dtype=torch.float32)
            if self.training and self.config.explore:
                explored = torch.rand(len(weights), 1, device=weights.device) < self.config.explore
                weights = torch.where(explored, random_weights(open_experts, self.config.top_k), weights)
            return Routing(self.experts, weights)
        if decisions.shape != open_experts.shape:
            raise AlignmentError(
                f"router language_model: decisions have shape {tuple(decisions.shape)}, expected (images, experts) = "
                f"{tuple(open_experts.shape)}"
            )
        chosen = ((decisions.to(summary.device) != 0) & open_experts).float()
        return Routing(self.experts, chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(1))
