"""How does the text part of a model that sees (Qwen2-VL, Qwen3-VL, GLM-4V) become a language model with a head?

transformers has no causal language model of these; published are whole models, whose names of weights differ by version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.models.position_axes import SERVED_AS

NAMES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of a whole model's text weights (as transformers writes them now, and as others did) → those of its text part. Those of the first
Qwen2-VL, ``model.layers…``, are these already."""

CONVERTED = ("qwen3_vl_moe_text", "glm4v_moe_text")
"""Those whose whole model's tensors transformers stacks or turns when it opens that: it is opened, and its tower let go."""


class TextPartForCausalLM(PreTrainedModel):
    """A text model of transformers with its head. The weights of a whole model's other parts are passed over when it is opened."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)visual\.", r"(^|\.)vision_tower\.", r"^mtp\."]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.config = self.model.config  # transformers gave it a copy
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # pyright: ignore[reportAttributeAccessIssue]
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self._no_split_modules = list(getattr(self.model, "_no_split_modules", None) or ())
        self.post_init()

    @classmethod
    def of(cls, whole: Any, config: PreTrainedConfig) -> TextPartForCausalLM:
        """The text part of a whole model, whose tensors it takes over. config: the text part's."""
        with torch.device("meta"):
            part = cls(config)
        part.model, part.lm_head = whole.model.language_model, whole.lm_head
        part.config = part.model.config
        return part

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings


class ExpertTextPartForCausalLM(TextPartForCausalLM):
    """One with experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for experts in this file; they are in the text model's


def is_language_model(config: PreTrainedConfig) -> bool:
    """Whether a config is of a language model with a head, of transformers or of `TextPartForCausalLM`."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in SERVED_AS


def causal_from_config(config: PreTrainedConfig) -> Any:
    """A language model with its head and weights of its own initialisation. config: of one (`is_language_model`)."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config)
    return (ExpertTextPartForCausalLM if config.model_type in CONVERTED else TextPartForCausalLM)(config)


def causal_from_pretrained(place: str, *, config: PreTrainedConfig, **options: Any) -> Any:
    """A published language model with its head.

    Args:
        place: a folder or hub id.
        config: of it, or of the text part of what it is.
        options: as ``from_pretrained`` of transformers takes them.

    Returns:
        What ``from_pretrained`` gives.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_pretrained(place, config=config, **options)
    if config.model_type in CONVERTED:
        whole, info = AutoModelForImageTextToText.from_pretrained(place, **{**options, "output_loading_info": True})  # pyright: ignore[reportGeneralTypeIssues]
        part = ExpertTextPartForCausalLM.of(whole, config)
        return (part, info) if options.get("output_loading_info") else part
    return TextPartForCausalLM.from_pretrained(place, config=config, key_mapping=NAMES, **options)


def decoder_of(causal: Any) -> Any:
    """The layers of a language model without its head.

    Args:
        causal: the whole language model.

    Returns:
        The module that gives hidden states. Llama 4 names another one as its base model, which is the whole.
    """
    return causal.model if causal.base_model is causal else causal.base_model
