"""What makes a directory of files complete or absent, whatever moment the process dies at?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.damage import damage_of

MANIFEST = "manifest.json"
WRITING, DELETING = ".writing-", ".deleting-"
_WHOLE_HASH = 64 << 20  # larger files are hashed at their ends and at even distances


def found(folder: Path) -> list[Path]:
    """A stage's checkpoints, the oldest first: ``step-…``, and TRL's ``checkpoint-…``, which are complete by their manifest alone."""
    own, trl = folder.glob("step-*"), folder.glob("checkpoint-*")
    return sorted([*own, *(path for path in trl if (path / MANIFEST).is_file())], key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return damage_of(path / MANIFEST) or f"{MANIFEST} cannot be read ({error})"
    for name, entry in manifest.get("files", {}).items():
        file = path / name
        if not file.is_file():
            writer = f" ({entry['machine']} wrote it, into a folder of its own)" if "machine" in entry else ""
            return f"{name} is missing{writer}"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
        if _hash(file) != entry["hash"]:
            return f"{name} was changed after it was written"
    return None


def describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "hash": _hash(path)}


def _hash(path: Path) -> str:
    """SHA-256 of a file; of a large one, of its length, both ends and 62 even places between, a megabyte each."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for start, length in _places(size):
            stream.seek(start)
            digest.update(stream.read(length))
    return digest.hexdigest()


def _places(size: int) -> Iterator[tuple[int, int]]:
    block = 1 << 20
    if size <= _WHOLE_HASH:
        yield 0, size
        return
    for k in range(64):
        yield (size - block) * k // 63, block


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a checkpoint such that a kill in between never leaves half of it under its name."""
    grave = path.with_name(f"{DELETING}{path.name}")
    shutil.rmtree(grave, ignore_errors=True)
    path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)
