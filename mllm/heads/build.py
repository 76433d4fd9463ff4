"""How do a recipe's heads become configs, and configs modules?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm.config import to_plain, validate
from mllm.errors import ConfigError, UnknownName, did_you_mean
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadParts

FORMER = "visual_head"
"""Name of the one head that recipes and checkpoints had before heads had names."""


def head_config(value: Any, *, where: str = "heads") -> Any:
    """The strict config of a mapping with ``type``. Raises `ConfigError` with the path to the key."""
    if isinstance(value, HeadConfig):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise ConfigError(f"{where}: expected a mapping with type, one of {', '.join(HEADS)}")
    if value["type"] not in HEADS:
        raise UnknownName(f"{where}.type", value["type"], HEADS)
    return validate(HEADS.get(value["type"]).Config, value, where=where)


def head_configs(heads: Mapping[str, Any] | None, *, where: str = "heads") -> dict[str, Any]:
    """Name → strict config, in the recipe's order. Raises `ConfigError` for two heads that draw."""
    configs = {name: head_config(value, where=f"{where}.{name}") for name, value in (heads or {}).items()}
    drawing = [name for name, config in configs.items() if HEADS.get(config.type).draws]
    if len(drawing) > 1:
        raise ConfigError(f"{where}: {drawing[0]} and {drawing[1]} both draw; a model draws with one head")
    return configs


def drawing_head(heads: Mapping[str, Any] | None) -> str | None:
    """Name of the head that draws; None for a model that draws nothing."""
    for name, value in (heads or {}).items():
        kind = value.type if isinstance(value, HeadConfig) else value.get("type")
        if kind in HEADS and HEADS.get(kind).draws:
            return name
    return None


def heads_with_weights(heads: Mapping[str, Any] | None) -> list[str]:
    """Names of the heads that have weights of their own."""
    return [name for name, value in (heads or {}).items() if HEADS.get(value["type"]).has_weights]


def heads_kept_whole(heads: Mapping[str, Any] | None) -> list[str]:
    """Names of the heads whose weights ZeRO-3 cannot spread (`Head.zero3`)."""
    return [name for name, value in (heads or {}).items() if not HEADS.get(value["type"]).zero3]


def encoders_read(heads: Mapping[str, Any] | None) -> frozenset[str]:
    """Encoders whose features some head reads."""
    configs = head_configs(heads).values()
    return frozenset(name for config in configs for name in HEADS.get(config.type).reads(config))


def build_heads(heads: Mapping[str, Any] | None, parts: HeadParts) -> nn.ModuleDict:
    """The heads of a resolved config, by name."""
    return nn.ModuleDict({name: build_head(name, config, parts) for name, config in head_configs(heads).items()})


def build_head(name: str, config: HeadConfig, parts: HeadParts) -> Head:
    """One head. Raises `ConfigError` for a head that does not fit the parts."""
    cls = HEADS.get(config.type)
    if parts.rules is not None and parts.rules.video is not None and not cls.reads_video:
        raise ConfigError(f"model.video: head {name!r} takes no video yet; leave it or the video section out")
    return cls(config, parts)


def head_tokens(heads: Mapping[str, Any] | None, parts: HeadParts, *, where: str = "model.heads") -> dict[str, bool]:
    """Tokens that the vocabulary needs for the heads, in the order in which they get ids → whether they are special. Raises
    `ConfigError` for a head that lacks what it stands on."""
    tokens: dict[str, bool] = {}
    for name, config in head_configs(heads, where=where).items():
        cls = HEADS.get(config.type)
        if cls.draws and parts.tokenizer is None:
            raise ConfigError(
                f"{where}.{name}: a {config.type} head draws, but there is no model.visual_tokenizer; add e.g. visual_tokenizer: "
                "{encoder: name} or {weights: folder}"
            )
        tokens |= dict.fromkeys(cls.tokens(config, parts), cls.special_tokens)
    return tokens


def keep_in_head(checkpoint: str | Path, name: str, **values: Any) -> None:
    """Write what was chosen on validation samples into a checkpoint's ``config.json``, where everything that answers reads it.

    Args:
        checkpoint: a folder that `save_pretrained` or a run wrote.
        name: the head's.
        values: keys of its config, as ``threshold`` of a segmentation head, ``calibration`` of a probability head.

    Raises:
        ConfigError: there is no such folder or head, or a value does not fit; nothing is written then.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: not a checkpoint folder, it has no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    heads = config.get("heads") or {}
    if name not in heads:
        raise ConfigError(
            f"{checkpoint}: no head {name!r}{did_you_mean(name, heads)}; its heads: {', '.join(heads) or 'none'}"
        )
    head_config({**heads[name], **values}, where=f"heads.{name}")
    heads[name] |= values
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def resolved_heads(
    heads: Mapping[str, Any] | None,
    parts: HeadParts,
    *,
    id_of: Callable[[str], int] | None,
    first_free: int,
    null: int,
    where: str = "model.heads",
) -> dict[str, dict[str, Any]]:
    """What a checkpoint's config says of a recipe's heads: their configs with the ids of their tokens. id_of: None before there is
    a text tokenizer (the ids then start at ``first_free``). Raises `ConfigError` for a head that does not fit the parts."""
    tokens = head_tokens(heads, parts, where=where)
    if id_of is None:
        numbers = {token: first_free + index for index, token in enumerate(tokens)}
        id_of = numbers.__getitem__
    resolved = {}
    for name, config in head_configs(heads, where=where).items():
        cls = HEADS.get(config.type)
        with torch.device("meta"):
            build_head(name, config, parts)  # a head that does not fit is told now
        resolved[name] = to_plain(cls.resolve(config, parts, id_of, null=null))
    return resolved
