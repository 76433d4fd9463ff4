"""How does a router's declaration become a config, and a config a module?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mllm.config import validate
from mllm.errors import ConfigError, did_you_mean
from mllm.routers import ROUTERS
from mllm.routers.base import Router, RouterConfig


def router_config(spec: Mapping[str, Any] | RouterConfig, where: str = "model.router") -> RouterConfig:
    """``{type: name, …}`` → the strict config of the class registered under that name.

    Raises `ConfigError` (`UnknownName` for the type) that starts with ``where``.
    """
    if isinstance(spec, RouterConfig):
        return spec
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"{where}: expected a mapping with a type, e.g. {{type: gate}}. Types: {', '.join(ROUTERS)}")
    return validate(ROUTERS.get(spec["type"]).Config, spec, where=where)


def build_router(
    config: Mapping[str, Any] | RouterConfig,
    summary_width: int,
    text_width: int,
    *,
    encoders: Iterable[str] | None = None,
    where: str = "model.router",
) -> Router:
    """A router with fresh weights. summary_width: channels of the image summary; text_width: L; encoders: the model's
    encoder names, to check the experts against.

    Raises `ConfigError` for an expert that is no encoder.
    """
    config = router_config(config, where)
    known = list(encoders) if encoders is not None else config.experts
    for name in config.experts:
        if name not in known:
            raise ConfigError(
                f"{where}.experts: the model has no encoder {name!r}{did_you_mean(name, known)}. Encoders: "
                f"{', '.join(known) or '-'}"
            )
    return ROUTERS.get(config.type)(config, summary_width, text_width)
