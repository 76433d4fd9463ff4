"""How does a recipe's visual tokenizer and head become config, tokens and weights of a model?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm.config import to_plain
from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import HeadParts
from mllm.heads.build import drawing_head, head_config
from mllm.heads.codes.grammar import make_span
from mllm.processing.visual_span import VisualSpan
from mllm.recipe import reader_of
from mllm.visual_tokenizers.base import CONFIG_FILE, VisualTokenizer, build_tokenizer, stored_config, tokenizer_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def tokenizer_settings(value: Mapping[str, Any] | None, encoders: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's config says of ``model.visual_tokenizer``: ``{encoder: name}``, or the tokenizer's whole config.

    encoders: name → resolved config. Raises `ConfigError` with the path to the key.
    """
    if value is None:
        return None
    where = "model.visual_tokenizer"
    if reader_of(value) is not None:
        name = value["encoder"]
        readers = [n for n, config in encoders.items() if config.type == "visual_tokenizer"]
        if name not in readers or len(value) > 1:
            raise ConfigError(
                f"{where}: {{encoder: {name}}} names an encoder of type visual_tokenizer and nothing else; this model has "
                f"{', '.join(readers) or 'none'}"
            )
        return {"encoder": name}
    data = {key: entry for key, entry in value.items() if key != "weights"}
    if not data:
        file = Path(str(value.get("weights"))) / CONFIG_FILE
        if not file.is_file():
            raise ConfigError(
                f"{where}.weights: {value.get('weights')} holds no saved visual tokenizer (no {CONFIG_FILE}); train one with "
                "`mllm tokenizer train`, or write its config out beside weights"
            )
        data = stored_config(file.parent)
    return to_plain(tokenizer_config(data, where=where))


def resolved_settings(settings: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's whole config for `tokenizer_settings`, those of the encoder that it may name."""
    name = reader_of(settings)
    if name is not None:
        encoder = encoders[name]
        settings = encoder["tokenizer"] if isinstance(encoder, Mapping) else encoder.tokenizer
    return dict(settings)


def empty_tokenizer(settings: Mapping[str, Any], encoders: Mapping[str, Any]) -> VisualTokenizer:
    """The tokenizer of `tokenizer_settings` on the meta device, for its sizes."""
    with torch.device("meta"):
        return build_tokenizer(resolved_settings(settings, encoders))


def visual_span(config: PreTrainedConfig) -> VisualSpan | None:
    """What the processor of an `MllmConfig` writes for an image to draw; None for a model that draws nothing."""
    name = drawing_head(config.heads)
    if name is None:
        return None
    head = head_config(config.heads[name])
    tokenizer = empty_tokenizer(config.visual_tokenizer, config.encoders)
    with torch.device("meta"):
        module = HEADS.get(head.type)(head, HeadParts(config.get_text_config().hidden_size, tokenizer=tokenizer))
    reader_name = reader_of(config.visual_tokenizer)
    reader = {} if reader_name is None else config.encoders[reader_name]
    return make_span(head, tokenizer, module.num_slots, resize=reader.get("resize", "squash"))
