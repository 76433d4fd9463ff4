"""What does a model that draws know of its images: tokenizer, grammar, ids, and how to start drawing?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import SuppressTokensLogitsProcessor

from mllm.models.image_generation.grammar import image_grammar, never_written, visual_tokens, vocabulary_offsets
from mllm.models.pipeline import shared_tokenizer
from mllm.visual_tokenizers.grammar import ImageGrammarProcessor

VLLM_PROCESSOR = "mllm.serve.vllm.logits_processor:DrawingProcessor"
"""For vLLM's ``logits_processors``: the image grammar of a model with a visual head, and its drawings."""


def vllm_options(config: Any) -> dict[str, Any]:
    """What a vLLM engine of this checkpoint needs so that its text follows `DrawingMixin.image_rules`."""
    return {"logits_processors": [VLLM_PROCESSOR]} if getattr(config, "visual_head", None) is not None else {}


class DrawingMixin:
    """The drawing side of `MllmForConditionalGeneration`; means something when its config has a ``visual_head``."""

    config: Any
    model: Any
    visual_config: Any
    visual_head: Any
    lm_head: Any
    _grammar: Any = None

    @property
    def image_tokenizer(self) -> Any:
        """The visual tokenizer the model draws with: its own, or that of one of its encoders."""
        own = self.model.visual_tokenizer
        return own if own is not None else shared_tokenizer(self.config, self.model.vision_tower)

    @property
    def grammar(self) -> Any:
        """The image grammar of a vocabulary head."""
        if self._grammar is None:
            self._grammar = image_grammar(self.visual_config, self.image_tokenizer)
        return self._grammar

    @property
    def code_offsets(self) -> Tensor:
        """``(S,)``: packed code s is the id ``offset[s] + code`` (vocabulary head)."""
        return vocabulary_offsets(self.visual_config, self.image_tokenizer)

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Which of input_ids ``(B, T)`` stand for an image, read or drawn."""
        grammar = self.grammar if self.visual_head is None else None
        return visual_tokens(input_ids, self.visual_config, grammar, self.config.image_token_id)

    def image_rules(self) -> Any:
        """The logits processor that keeps generated text to what the visual head allows."""
        never = never_written(self.visual_config, self.config.image_token_id, self.lm_head.weight.shape[0])
        if self.visual_head is None:
            return ImageGrammarProcessor(self.grammar, never=never)
        return SuppressTokensLogitsProcessor(never, device=self.device)

    def generate_images(self, prompts: Any, **options: Any) -> Any:
        """Draw one image per prompt; see `mllm.models.image_generation.generate.generate_images`."""
        from mllm.models.image_generation.generate import generate_images

        return generate_images(self, prompts, **options)

    def generate_interleaved(self, prompts: Any, **options: Any) -> Any:
        """Answer with text and images; see `mllm.models.image_generation.generate.generate_interleaved`."""
        from mllm.models.image_generation.generate import generate_interleaved

        return generate_interleaved(self, prompts, **options)
