"""Where are the shipped YAML files, and which file does a name mean?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mllm.errors import UnknownName

_PACKAGE = Path(__file__).resolve().parent


def roots() -> list[Path]:
    """Directories that hold ``recipes/ data/ eval/``, first match wins: the working directory, ``$MLLM_PATH`` (colon
    separated), then the shipped ones."""
    shipped = _PACKAGE / "_assets"
    own = shipped if shipped.is_dir() else _PACKAGE.parent
    extra = [Path(p).expanduser() for p in os.environ.get("MLLM_PATH", "").split(os.pathsep) if p]
    return list(dict.fromkeys([Path.cwd(), *extra, own]))


def available(folder: str) -> dict[str, Path]:
    """Name → file of every YAML in ``folder`` (``recipes``, ``data/mixtures`` …) over all roots."""
    found: dict[str, Path] = {}
    for root in roots():
        for path in sorted((root / folder).glob("*.yaml")) if (root / folder).is_dir() else []:
            found.setdefault(path.stem, path)
    return found


def find(folder: str, name: str, *, kind: str) -> Path:
    """The file that ``name`` means: a path, a stem in ``folder``, or a folder that holds one, as a checkpoint holds its ``recipe.yaml``.
    Raises `UnknownName`."""
    if name.endswith((".yaml", ".yml", ".json")) or os.sep in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        for root in roots():
            if (root / name).is_file():
                return root / name
    known = available(folder)
    if name in known:
        return known[name]
    kept = Path(name).expanduser() / f"{kind}.yaml"
    if kept.is_file():
        return kept
    raise UnknownName(kind, name, known)


def shipped_text(relative: str) -> str:
    """Text of a shipped file such as ``recipes/deepspeed/zero2.json``."""
    for root in reversed(roots()):
        if (root / relative).is_file():
            return (root / relative).read_text(encoding="utf-8")
    raise FileNotFoundError(relative)


def iterate(folder: str) -> Iterator[tuple[str, Path]]:
    """Every YAML of ``folder`` as (name, path), by name."""
    yield from sorted(available(folder).items())
