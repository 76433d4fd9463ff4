"""Which encoders are known by name, and what does a recipe's mention of one mean?"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.config import read_yaml, validate
from mllm.encoders import ENCODERS
from mllm.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from mllm.encoders.base import EncoderConfig, VisionEncoder

_FILES = ("catalogue.yaml", "backbones/catalogue.yaml")


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for file in _FILES:
        more = read_yaml(Path(__file__).parent / file)
        assert not entries.keys() & more.keys(), f"{file} repeats {sorted(entries.keys() & more.keys())}"
        entries |= more
    return entries


def catalogue() -> dict[str, dict[str, Any]]:
    """Name → config as plain data, with ``note``. Imports no torch."""
    return copy.deepcopy(_entries())


def encoder_config(spec: str | Mapping[str, Any], *, where: str) -> EncoderConfig:
    """The resolved config that a recipe's encoder means.

    spec: a name (`mllm list encoders`), ``{preset: name, …changes}`` where changed mappings such as ``weights`` are
    merged, or a whole config with ``type``. Raises `ConfigError` that starts with ``where``.
    """
    data = _expand(spec, where)
    kind = data.get("type")
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: give preset (a name of `mllm list encoders`) or type ({', '.join(ENCODERS)})")
    if kind not in ENCODERS:
        raise _unknown("encoder type", kind, ENCODERS, f"{where}.type")
    encoder = ENCODERS.get(kind)
    config = validate(encoder.Config, data, where=where)
    if config.info is not None:
        return config
    try:
        return encoder.resolve(config)
    except ConfigError as error:
        joint = "." if re.match(r"[a-z_.]+: ", str(error)) else ": "
        raise ConfigError(f"{where}{joint}{error}") from error


def build_encoder(config: EncoderConfig) -> VisionEncoder:
    """The encoder of a config, without weights."""
    return ENCODERS.get(config.type)(config)


def licence_warnings(configs: Mapping[str, EncoderConfig] | Iterable[EncoderConfig]) -> list[str]:
    """One sentence for each encoder whose weights are restricted, or whose licence is not known."""
    named = configs.items() if isinstance(configs, Mapping) else ((config.type, config) for config in configs)
    warnings = []
    for name, config in named:
        weights = config.weights
        if weights is None:
            continue
        what = f"encoder {name}: the weights {weights.source} ({weights.licence})"
        if weights.commercial is False:
            warnings.append(f"{what} may not be used commercially")
        elif weights.commercial is None or weights.licence == "unknown":
            warnings.append(f"{what} have no known licence for commercial use; look it up and state it under weights")
        if weights.territory:
            warnings.append(f"{what} are restricted by territory: {weights.territory}")
    return warnings


def _expand(spec: str | Mapping[str, Any], where: str) -> dict[str, Any]:
    if isinstance(spec, str):
        spec = {"preset": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where}: expected an encoder's name or a mapping, got {type(spec).__name__}")
    data = dict(spec)
    if "preset" not in data:
        return data
    name = data.pop("preset")
    entries = catalogue()
    if name not in entries:
        raise _unknown("encoder", str(name), entries, where)
    base = entries[name]
    base.pop("note", None)
    if data.get("type", base["type"]) != base["type"]:
        raise ConfigError(
            f"{where}.type: preset {name} is of type {base['type']}; write a whole config to use another type"
        )
    for key, value in data.items():
        merges = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = {**base[key], **value} if merges else value
    return base


def _unknown(kind: str, name: str, known: Iterable[str], where: str) -> UnknownName:
    error = UnknownName(kind, name, known)
    error.args = (f"{where}: {error}. `mllm list encoders` describes them",)
    return error
