"""Which quantizers are there, and how is one built from its config?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from mllm.config import validate
from mllm.errors import ConfigError
from mllm.registry import Registry
from mllm.visual_tokenizers.quantizers.base import Quantizer, QuantizerConfig, QuantizerOutput

__all__ = ["QUANTIZERS", "Quantizer", "QuantizerConfig", "QuantizerField", "QuantizerOutput", "build_quantizer"]

_HERE = "mllm.visual_tokenizers.quantizers"

QUANTIZERS: Registry = Registry(
    "quantizer",
    {
        "vq": f"{_HERE}.vector:VectorQuantizer",
        "residual": f"{_HERE}.residual:ResidualQuantizer",
        "multi_scale": f"{_HERE}.multi_scale:MultiScaleQuantizer",
        "intra_inter": f"{_HERE}.intra_inter:IntraInterQuantizer",
        "product": f"{_HERE}.product:ProductQuantizer",
        "lookup_free": f"{_HERE}.lookup_free:LookupFreeQuantizer",
        "finite_scalar": f"{_HERE}.lookup_free:FiniteScalarQuantizer",
    },
)


def parse_quantizer(value: Any) -> QuantizerConfig:
    """The strict config that a mapping with ``type`` means. Raises `ConfigError`."""
    if isinstance(value, QuantizerConfig):
        return value
    if not isinstance(value, Mapping) or "type" not in value:
        raise ConfigError(f"a quantizer is a mapping with type, one of {', '.join(QUANTIZERS)}")
    return validate(QUANTIZERS.get(value["type"]).Config, value, where=str(value["type"]))


QuantizerField = Annotated[SerializeAsAny[QuantizerConfig], BeforeValidator(parse_quantizer)]
"""Field type of a config that holds any registered quantizer's config."""


def build_quantizer(config: QuantizerConfig | Mapping[str, Any]) -> Quantizer:
    """A quantizer from its config."""
    config = parse_quantizer(config)
    return QUANTIZERS.get(config.type)(config)
