"""Which layers of a model does fsdp2 share one by one?"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from mllm.errors import ConfigError
from mllm.models.compilation import repeated_layers

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def layers_to_share(model: nn.Module, stage: str) -> tuple[nn.Module, list[nn.Module]]:
    """A model's decoder, and its layers.

    Raises `ConfigError` for a model without a row of like layers that every pass runs.
    """
    where = f"stages.{stage}.engine: fsdp2 shares the layers of a language model"
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None:
        raise ConfigError(f"{where}, and this stage trains none; use none, sharded, zero1 or zero2")
    decoder = get_decoder()
    layers = repeated_layers(decoder)
    found = {id(layer) for layer in layers}
    names = [name for name, module in decoder.named_modules() if id(module) in found]
    inner = next((name for name in names if len(_NUMBER.findall(name)) > 1), None)
    if inner is not None:
        raise ConfigError(
            f"{where} that every token passes, and {inner} of {type(decoder).__name__} lies within another; use sharded, zero2 or zero3"
        )
    if not layers:
        raise ConfigError(
            f"{where} where they are alike, and {type(decoder).__name__} has no such row; use sharded, zero2 or zero3"
        )
    return decoder, layers
