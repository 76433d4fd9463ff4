"""How does a recipe's visual tokenizer and head become config, tokens and weights of a model?"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken

from mllm.config import to_plain
from mllm.errors import ConfigError
from mllm.models.image_generation.grammar import head_tokens, make_span, resolve_head
from mllm.models.image_generation.heads import build_head, check_weights, head_config
from mllm.processing.visual_span import VisualSpan
from mllm.visual_tokenizers.base import CONFIG_FILE, VisualTokenizer, build_tokenizer, stored_config, tokenizer_config


def tokenizer_settings(value: Mapping[str, Any] | None, encoders: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's config says of ``model.visual_tokenizer``: ``{encoder: name}``, or the tokenizer's whole config.

    encoders: name → resolved config. Raises `ConfigError` with the path to the key.
    """
    if value is None:
        return None
    where = "model.visual_tokenizer"
    if "encoder" in value:
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
    if "encoder" in settings:
        encoder = encoders[settings["encoder"]]
        settings = encoder["tokenizer"] if isinstance(encoder, Mapping) else encoder.tokenizer
    return dict(settings)


def empty_tokenizer(settings: Mapping[str, Any], encoders: Mapping[str, Any]) -> VisualTokenizer:
    """The tokenizer of `tokenizer_settings` on the meta device, for its sizes."""
    with torch.device("meta"):
        return build_tokenizer(resolved_settings(settings, encoders))


def head_settings_of(
    value: Mapping[str, Any] | None,
    tokenizer: Mapping[str, Any] | None,
    encoders: Mapping[str, Any],
    *,
    width: int,
    id_of: Callable[[str], int] | None,
    first_free: int,
    null: int,
) -> dict[str, Any] | None:
    """A head's config with its ids. id_of: None before there is a text tokenizer (the ids then start at ``first_free``)."""
    if value is None:
        return None
    assert tokenizer is not None
    config = head_config(value, where="model.visual_head")
    empty = empty_tokenizer(tokenizer, encoders)
    check_weights(config, empty)
    if id_of is None:
        numbers = {name: first_free + index for index, name in enumerate(head_tokens(config, empty))}
        id_of = numbers.__getitem__
    with torch.device("meta"):
        build_head(config, empty, width)  # a head that does not fit is told now
    return to_plain(resolve_head(config, empty, id_of, null=null))


def add_head_tokens(
    tokenizer: Any, value: Mapping[str, Any] | None, settings: Mapping[str, Any] | None, encoders: Mapping[str, Any]
) -> None:
    """Give a text tokenizer the tokens that a head needs."""
    if value is None or settings is None:
        return
    names = head_tokens(head_config(value, where="model.visual_head"), empty_tokenizer(settings, encoders))
    known = tokenizer.get_vocab()
    missing = [AddedToken(name, special=True, normalized=False) for name in names if name not in known]
    tokenizer.add_tokens(missing, special_tokens=True)


def visual_span(config: Any) -> VisualSpan | None:
    """What the processor of an `MllmConfig` writes for an image to draw; None for a model that draws nothing."""
    if config.visual_head is None:
        return None
    head = head_config(config.visual_head)
    tokenizer = empty_tokenizer(config.visual_tokenizer, config.encoders)
    with torch.device("meta"):
        module = build_head(head, tokenizer, config.get_text_config().hidden_size)
    reader = config.encoders[config.visual_tokenizer["encoder"]] if "encoder" in config.visual_tokenizer else {}
    slots = tokenizer.tokens_per_image if module is None else module.num_slots
    return make_span(head, tokenizer, slots, resize=reader.get("resize", "squash"))
