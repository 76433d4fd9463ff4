"""Where does generation stop?"""

# transformers' own annotations do not fit their documented use.

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import AutoConfig, GenerationConfig

from mllm.models.vocabulary import num_token_ids
from mllm.processing.chat import turn_ends
from mllm.processing.protocol import Processor

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


def set_stops(
    model: MllmForConditionalGeneration, processor: Processor, *, source: str | None = None, revision: str | None = None
) -> None:
    """Let generation stop at what the language model's own ``generation_config`` stops at, at the tokenizer's EOS, and at every
    token by which the chat template ends an assistant's turn. source: folder or hub id of the language model."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    own = [number for number in source_stops(source, revision) if number < num_token_ids(tokenizer)]
    stops = list(dict.fromkeys([*eos, *own, *turn_ends(processor)]))
    generation.eos_token_id = stops if len(stops) != 1 else stops[0]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id


def source_stops(source: str | None, revision: str | None = None) -> list[int]:
    """Ids at which the source's ``generation_config`` stops, else those of its config; [] where there is neither."""
    if source is None:
        return []
    for kind in (GenerationConfig, AutoConfig):
        try:
            config = kind.from_pretrained(source, revision=revision)  # pyright: ignore[reportArgumentType]
        except (OSError, ValueError):
            continue
        found = getattr(config, "eos_token_id", None)
        if found is None and hasattr(config, "get_text_config"):
            found = getattr(config.get_text_config(), "eos_token_id", None)  # pyright: ignore[reportAttributeAccessIssue]
        if found is not None:
            return [int(number) for number in (found if isinstance(found, Iterable) else [found])]
    return []
