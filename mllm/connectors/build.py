"""How does a connector's declaration become a config, and a config a module?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.config import validate
from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.errors import ConfigError
from mllm.types import EncoderInfo


def connector_config(spec: Mapping[str, Any] | ConnectorConfig, where: str = "model.connector") -> ConnectorConfig:
    """``{type: name, …}`` → the strict config of the class registered under that name.

    Raises `ConfigError` (`UnknownName` for the type) that starts with ``where``.
    """
    if isinstance(spec, ConnectorConfig):
        return spec
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise ConfigError(
            f"{where}: expected a mapping with a type, e.g. {{type: mlp}}. Types: {', '.join(CONNECTORS)}"
        )
    return validate(CONNECTORS.get(spec["type"]).Config, spec, where=where)


def build_connector(
    config: Mapping[str, Any] | ConnectorConfig, encoders: Mapping[str, EncoderInfo], width: int
) -> Connector:
    """A connector with fresh weights. encoders: name → sizes in the model's order; width: L.

    Raises `ConfigError` when an encoder does not fit.
    """
    config = connector_config(config)
    return CONNECTORS.get(config.type)(config, encoders, width)
