"""How many tokens does an image become, and where do they lie? The one place that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.types import EncoderInfo, ImageLayout

PRIMARY_PIXELS = "pixel_values"


def image_layout(encoders: Mapping[str, EncoderInfo], connector: Any) -> ImageLayout:
    """Layout of one image after a connector. encoders: name → sizes in the model's order; connector: its validated config.

    Raises `ConfigError` when an encoder's grid does not fit the connector.
    """
    from mllm.connectors import CONNECTORS

    return CONNECTORS.get(connector.type).layout(connector, encoders)


def pixel_keys(encoder_names: list[str]) -> dict[str, str]:
    """Encoder name → key of its pixels in a batch: ``pixel_values`` for the first (the name HF and vLLM know),
    ``pixel_values_<name>`` for the others."""
    return {name: PRIMARY_PIXELS if i == 0 else f"{PRIMARY_PIXELS}_{name}" for i, name in enumerate(encoder_names)}
