"""What does a model that draws know of its images: tokenizer, grammar, ids, and how to start drawing?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from mllm.errors import ConfigError
from mllm.heads.base import MultimodalModel
from mllm.heads.build import drawing_head
from mllm.heads.codes.grammar import image_grammar, never_written, visual_tokens
from mllm.visual_tokenizers.sequence import ImageGrammarProcessor, NeverWritten

VLLM_PROCESSOR = "mllm.serve.vllm.logits_processor:DrawingProcessor"
"""For vLLM's ``logits_processors``: the image grammar of a model with a visual head, and its drawings. It knows vLLM's first model
runner only."""
VLLM_PLACEHOLDER = "mllm.serve.vllm.placeholder:PlaceholderProcessor"
"""For vLLM's ``logits_processors``: no answer of any other model holds a picture's placeholder."""


def vllm_options(config: PreTrainedConfig, *, draws: bool = True) -> dict[str, Any]:
    """What a vLLM engine of this checkpoint needs so that its text follows `DrawingMixin.image_rules`, and never holds a
    placeholder. draws: False where the engine cannot draw (vLLM's Transformers backend)."""
    if getattr(config, "image_token_id", None) is None:
        return {}
    drawing = draws and getattr(config, "drawing_head", None) is not None
    return {"logits_processors": [VLLM_PROCESSOR if drawing else VLLM_PLACEHOLDER]}


def vllm_environment(options: dict[str, Any]) -> dict[str, str]:
    """Environment variables that an engine with `vllm_options` needs before it starts."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"} if VLLM_PROCESSOR in options.get("logits_processors", ()) else {}


class DrawingMixin:
    """The drawing side of `MllmForConditionalGeneration`; means something when its config has a ``visual_head``."""

    config: PreTrainedConfig
    model: Any
    heads: Any
    lm_head: Any
    _grammar: Any = None

    @property
    def visual_head(self) -> Any:
        """The head that draws; None for a model that draws nothing."""
        name = drawing_head(self.config.heads)
        return None if name is None else self.heads[name]

    @property
    def visual_config(self) -> Any:
        """Its config; None for a model that draws nothing."""
        head = self.visual_head
        return None if head is None else head.config

    @property
    def image_tokenizer(self) -> Any:
        """The visual tokenizer the model draws with: its own, or that of one of its encoders."""
        own = self.model.visual_tokenizer
        return own if own is not None else tokenizer_of_encoder(self.config, self.model.vision_tower)

    @property
    def grammar(self) -> Any:
        """The image grammar of a vocabulary head."""
        if self._grammar is None:
            self._grammar = image_grammar(self.visual_config, self.image_tokenizer)
        return self._grammar

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Which of input_ids ``(B, T)`` stand for an image, read or drawn."""
        grammar = None if self.visual_head.has_weights else self.grammar
        return visual_tokens(input_ids, self.visual_config, grammar, self.config.image_token_id)

    def image_rules(self) -> Any:
        """The logits processor that keeps generated text to what the visual head allows."""
        never = never_written(self.config)
        if not self.visual_head.has_weights:
            return ImageGrammarProcessor(self.grammar, never=never)
        return NeverWritten(never, device=self.device)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_images(self: MultimodalModel, prompts: Any, **options: Any) -> Any:
        """Draw one image per prompt; see `mllm.heads.codes.generate.generate_images`."""
        from mllm.heads.codes.generate import generate_images

        return generate_images(self, prompts, **options)

    def generate_interleaved(self: MultimodalModel, prompts: Any, **options: Any) -> Any:
        """Answer with text and images; see `mllm.heads.codes.generate.generate_interleaved`."""
        from mllm.heads.codes.generate import generate_interleaved

        return generate_interleaved(self, prompts, **options)


def tokenizer_of_encoder(config: PreTrainedConfig, bank: Any) -> Any:
    """The visual tokenizer inside the encoder that ``visual_tokenizer: {encoder: name}`` names. Raises `ConfigError`."""
    if config.visual_tokenizer is None:
        raise ConfigError("heads: the model has no visual_tokenizer to draw with")
    name = config.visual_tokenizer["encoder"]
    encoder = bank.encoders[name] if bank is not None and name in bank.encoders else None
    if not hasattr(encoder, "tokenizer"):
        readers = [n for n, e in config.encoders.items() if e.get("type") == "visual_tokenizer"]
        raise ConfigError(
            f"visual_tokenizer.encoder: {name!r} is no encoder of type visual_tokenizer; the model has {readers or 'none'}"
        )
    return encoder.tokenizer  # pyright: ignore[reportOptionalMemberAccess]
