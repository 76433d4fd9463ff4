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
from mllm.errors import ConfigError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from mllm.encoders.base import EncoderConfig, VisionEncoder

_FILES = ("catalogue.yaml", "backbones/catalogue.yaml")
DESCRIPTIONS = ("note", "about")
"""Keys of an entry that are no part of its config."""


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for file in _FILES:
        more = read_yaml(Path(__file__).parent / file)
        assert not entries.keys() & more.keys(), f"{file} repeats {sorted(entries.keys() & more.keys())}"
        entries |= more
    return entries


def catalogue() -> dict[str, dict[str, Any]]:
    """Name → config as plain data, with ``note`` and ``about`` (``kind``, ``objective``, and ``millions`` of parameters up to the
    feature layer). Imports no torch."""
    return copy.deepcopy(_entries())


def matching(
    *,
    kind: str | None = None,
    objective: str | None = None,
    licence: str | None = None,
    commercial: bool = False,
    least: float | None = None,
    most: float | None = None,
    words: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The entries for which all that is given holds. licence, words: parts of the licence's name; of name, capability and note
    (case does not matter); least, most: millions of parameters. Raises `ConfigError` for a kind, objective or licence that no entry has,
    and for sizes that no number is between."""
    entries = catalogue()
    if least is not None and most is not None and least > most:
        raise ConfigError(f"size: at least {least:g} and at most {most:g} million parameters; no number is both")
    licences = sorted({str((entry.get("weights") or {}).get("licence")) for entry in entries.values()} - {"None"})
    if licence is not None and not any(licence.lower() in known.lower() for known in licences):
        meant = did_you_mean(licence, licences) or "."
        raise ConfigError(f"licence: no encoder's weights are under {licence!r}{meant} Known: {', '.join(licences)}")
    for key, value in (("kind", kind), ("objective", objective)):
        known = sorted({entry["about"][key] for entry in entries.values()})
        if value is not None and value not in known:
            meant = did_you_mean(value, known) or "."
            raise ConfigError(f"{key}: no encoder is of {value!r}{meant} Known: {', '.join(known)}")

    def fits(name: str, entry: dict[str, Any]) -> bool:
        about, weights = entry["about"], entry.get("weights") or {}
        text = " ".join([name, entry.get("capability", ""), entry.get("note", "")]).lower()
        return (
            kind in (None, about["kind"])
            and objective in (None, about["objective"])
            and (licence is None or licence.lower() in str(weights.get("licence", "")).lower())
            and (not commercial or weights.get("commercial") is True)
            and (least is None or about["millions"] >= least)
            and (most is None or about["millions"] <= most)
            and (words is None or all(word in text for word in words.lower().split()))
        )

    return {name: entry for name, entry in sorted(entries.items()) if fits(name, entry)}


def encoder_config(spec: str | Mapping[str, Any], *, where: str) -> EncoderConfig:
    """The resolved config that a recipe's encoder means.

    spec: a name (`mllm list encoders`), ``{preset: name, …changes}`` where changed mappings such as ``weights`` are
    merged, or a whole config with ``type``. Raises `ConfigError` that starts with ``where``.
    """
    data = expanded(spec, where)
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


def expanded(spec: str | Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe's mention of an encoder as a whole config's data, a preset's own included. Raises `ConfigError` opening with ``where``."""
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
    for key in DESCRIPTIONS:
        base.pop(key, None)
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
