"""Does a language model give inside the multimodal one what it gives alone: the same logits, by a cache, each token from those before it?

Asked of the class that transformers has for it, before any weight is there: the decoder is left out, and numbers written down by hand go
through what the class does before and behind its head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from mllm.errors import ConfigError
from mllm.models.configuration_mllm import head_settings, treated
from mllm.models.text_part import TextPartForCausalLM, causal_from_config, decoder_of

_NEEDED = ("inputs_embeds", "past_key_values")
_CURE = "Give one whose layers attend with a cache and whose head is one matrix, such as {model_type: qwen2, …}"


class _Said(MoeModelOutputWithPast):
    """What a decoder returns, and nothing under every other name."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def check_inside(config: PreTrainedConfig) -> bool:
    """Whether the head of a language model has a bias.

    Args:
        config: the language model's.

    Returns:
        True where it has.

    Raises:
        ConfigError: it would not give inside the multimodal model what it gives alone.
    """
    kind = config.model_type
    with torch.device("meta"):
        causal = causal_from_config(config)
    head = causal.get_output_embeddings()
    takes = inspect.signature(decoder_of(causal).forward).parameters
    if absent := [name for name in _NEEDED if name not in takes]:
        raise ConfigError(
            f"model.language_model: {kind} takes no {' and no '.join(absent)}, by which pictures and answers are read. {_CURE}"
        )
    if head is None:
        raise ConfigError(f"model.language_model: {kind} has no head over the vocabulary. {_CURE}")
    if not isinstance(causal, TextPartForCausalLM):  # ours, compared with whole models of its kinds
        _check_head(causal, config)
    return getattr(head, "bias", None) is not None


def _check_head(causal: Any, config: PreTrainedConfig) -> None:
    """Raises `ConfigError` where the class makes other logits of a hidden state than the multimodal model would."""
    head = causal.get_output_embeddings()
    hidden = torch.linspace(-2.0, 2.0, 2 * config.hidden_size).view(1, 2, -1)
    given = torch.linspace(-90.0, 90.0, 2 * config.vocab_size).view(1, 2, -1)
    seen: list[Tensor] = []

    def multiply(states: Tensor) -> Tensor:
        seen.append(states)
        return given.clone()

    for decoder in {decoder_of(causal), causal.get_decoder()} - {causal}:  # OPT's asks for an inner one
        decoder.forward = lambda *_, **__: _Said(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType]
    head.forward = multiply
    told = f"model.language_model: {config.model_type} does more between its last layer and its logits than this toolkit knows"
    try:
        with torch.no_grad():
            logits = causal(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, return_dict=True).logits
        before = float((seen[-1] / hidden).median())
        wanted = treated(given / before, head_settings(config))
        same = torch.allclose(seen[-1], hidden * before, rtol=1e-4) and torch.allclose(
            logits, wanted, rtol=1e-4, atol=1e-4
        )
    except Exception as error:
        raise ConfigError(f"{told} ({type(error).__name__}: {str(error)[:120]}). {_CURE}") from error
    if not same:
        raise ConfigError(f"{told}. {_CURE}")
