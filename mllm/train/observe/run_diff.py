"""What differs between two runs: code, packages, recipe, data, and where their numbers part?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError
from mllm.train.observe.run_info import FILE
from mllm.train.observe.tracking import read_metrics

_FLEETING = {"started", "starts"}
_NUMBERS = ("loss", "grad_norm", "lr", "data", "samples", "tokens")


@dataclass
class RunDiff:
    """settings: (key, value in A, value in B) of everything in ``run.json`` that differs; common: steps both logged;
    first: (stage, step, what, A, B) where the numbers first part, None when they never do; last: stage → final losses."""

    settings: list[tuple[str, Any, Any]]
    common: int = 0
    first: tuple[str, int, str, Any, Any] | None = None
    last: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not self.settings and self.first is None


def diff_runs(a: Path, b: Path) -> RunDiff:
    """Compare two output folders, stage folders, or ``run.json`` files. Raises `ConfigError` where there is no run."""
    folders = [_folder(Path(path)) for path in (a, b)]
    infos = [json.loads((folder / FILE).read_text(encoding="utf-8")) for folder in folders]
    flat = [dict(_flatten({k: v for k, v in info.items() if k not in _FLEETING})) for info in infos]
    absent = object()
    keys = [*flat[0], *(k for k in flat[1] if k not in flat[0])]
    settings = [
        (key, flat[0].get(key), flat[1].get(key))
        for key in keys
        if flat[0].get(key, absent) != flat[1].get(key, absent)
    ]
    return _compare_numbers(RunDiff(settings), *(read_metrics(folder) for folder in folders))


def _folder(path: Path) -> Path:
    folder = path.parent if path.name == FILE else path
    if not (folder / FILE).is_file():
        raise ConfigError(f"{path}: holds no run ({FILE} is missing); give a folder that `mllm train` wrote")
    return folder


def _compare_numbers(diff: RunDiff, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> RunDiff:
    first, second = ({(r["stage"], r["step"]): r for r in records} for records in (a, b))
    for key, record in first.items():
        if key not in second:
            continue
        diff.common += 1
        for name in _NUMBERS:
            if diff.first is None and record.get(name) != second[key].get(name):
                diff.first = (*key, name, record.get(name), second[key].get(name))
    for stage in dict.fromkeys(stage for stage, _ in [*first, *second]):
        losses = [next((r.get("loss") for r in reversed(records) if r["stage"] == stage), None) for records in (a, b)]
        diff.last[stage] = (losses[0], losses[1])
    return diff


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """``a.b.c`` → value; items of a list by their ``name`` or ``group``, else by position."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}{key}.")
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for position, item in enumerate(value):
            yield from _flatten(item, f"{prefix}{item.get('name') or item.get('group') or position}.")
    else:
        yield prefix.rstrip("."), value
