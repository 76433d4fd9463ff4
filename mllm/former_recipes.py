"""What does a recipe that an earlier version wrote say in today's words?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mllm.config import read_yaml
from mllm.errors import ConfigError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CURE = "`mllm convert OLD.yaml NEW.yaml` rewrites the file"
WITHDRAWN: dict[str, Any] = {"encoders_beside_update": False}
"""Settings of a stage that there are no more, with what they were by default: a stage that was trained so is as it would be today."""


def upgraded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The same recipe (plain data) in today's dialect; one that is in it already comes back equal."""
    result = copy.deepcopy(dict(recipe))
    if "tokenizer" in result and "stages" not in result:
        return _tokenizer_recipe(result)
    if isinstance(result.get("model"), Mapping):
        result["model"] = upgraded_model(result["model"])
    result["stages"] = [upgraded_stage(s) if isinstance(s, Mapping) else s for s in result.get("stages") or []]
    return result


def upgraded_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's model in today's dialect: what draws was ``visual_head`` before heads had names."""
    result = dict(model)
    former = result.pop("visual_head", None)
    if former is not None:
        result["heads"] = {"visual_head": former, **(result.get("heads") or {})}
    return result


def upgraded_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    """One stage's settings in today's dialect: ``precision`` was ``dtype``, ``rate`` of a part ``lr``, and of
    `WITHDRAWN` settings only those stay that were not at their default."""
    result = copy.deepcopy(dict(stage))
    result = {("dtype" if key == "precision" else key): value for key, value in result.items()}
    for key in ("dtype", "cache_features"):
        if isinstance(result.get(key), str):
            result[key] = _DTYPES.get(result[key], result[key])
    result = {key: value for key, value in result.items() if key not in WITHDRAWN or value != WITHDRAWN[key]}
    if isinstance(result.get("learn"), Mapping):
        result["learn"] = {part: _renamed(spec, "rate", "lr") for part, spec in result["learn"].items()}
    return result


def withdrawn_from(stage: dict[str, Any]) -> dict[str, Any]:
    """Takes the `WITHDRAWN` settings out of a stage, so that it is one of today's; returns them."""
    return {key: stage.pop(key) for key in WITHDRAWN if key in stage}


def is_former(recipe: Any) -> bool:
    """Whether a recipe (plain data) is in an earlier dialect."""
    stages = isinstance(recipe, Mapping) and (recipe.get("stages") or recipe.get("tokenizer"))
    return bool(stages) and upgraded(recipe) != dict(recipe)


def convert_recipe(source: str | Path, target: str | Path) -> Path:
    """Write a recipe file in today's dialect to ``target``; the comments at its head are kept.

    Raises `ConfigError` for a file that is no recipe, is in today's dialect already, or a target that is there.
    """
    source, target = Path(source), Path(target)
    plain = read_yaml(source)
    if not isinstance(plain, Mapping) or not (plain.get("stages") or plain.get("tokenizer")):
        raise ConfigError(f"{source}: no recipe (a mapping with stages)")
    if not is_former(plain):
        raise ConfigError(f"{source} is in today's dialect already; there is nothing to convert")
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ConfigError(f"{target} exists; choose another name")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    head = next((k for k, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = yaml.safe_dump(upgraded(plain), sort_keys=False, allow_unicode=True, width=120)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines[:head]) + text, encoding="utf-8")
    return target


_OF_RECIPE = ("name", "description", "source", "plugins", "seed", "output", "hardware")
_OF_STAGE = ("steps", "batch_size", "log_every", "save_every")
_OF_OPTIONS = ("losses", "teacher", "init", "init_skip", "freeze", "kmeans", "evaluate_every", "evaluate_images")


def _tokenizer_recipe(former: dict[str, Any]) -> dict[str, Any]:
    """A recipe of the format that visual tokenizers had for themselves, as one with a stage. What it left to the format's own
    defaults is written out."""
    lr = former.get("rate", 1e-4)
    parts = [prefix.rstrip(".") for prefix in former.get("only") or []]
    optimizer = {"betas": [0.9, 0.95], **(former.get("optimizer") or {})}
    if former.get("ema"):
        optimizer["ema"] = former["ema"]
    stage = {
        "name": "tokenizer",
        "kind": "tokenizer",
        "learn": {f"visual_tokenizer.{part}": lr for part in parts} or {"visual_tokenizer": lr},
        "data": former.get("images"),
        "batch_size": 32,
        "log_every": 10,
        **{key: former[key] for key in _OF_STAGE if key in former},
        "dtype": _DTYPES[former.get("precision", "fp32")],
        "optimizer": optimizer,
        "schedule": former.get("schedule") or {"type": "constant", "warmup": 0.0},
    }
    options = {key: former[key] for key in _OF_OPTIONS if former.get(key) is not None}
    for path in (("losses", "adversarial"), ("teacher", "supervised")):
        outer, inner = path
        if isinstance(options.get(outer), Mapping) and isinstance(options[outer].get(inner), Mapping):
            options[outer] = {**options[outer], inner: _renamed(options[outer][inner], "rate", "lr")}
    if options:
        stage["options"] = options
    kept = {key: former[key] for key in _OF_RECIPE if key in former}
    return {**kept, "model": {"visual_tokenizer": former["tokenizer"]}, "stages": [stage]}


def _renamed(value: Any, old: str, new: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {(new if key == old else key): item for key, item in value.items()}
