"""Which plug-in code does a checkpoint carry, and may it run?

A model built from plug-in components cannot be opened without them. So their files are copied into the checkpoint, with their
hashes in ``config.json``. Opening a checkpoint never runs code out of it unasked: the user names the file, or trusts all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm.errors import CheckpointError
from mllm.plugins import content_hash, is_loaded, load_plugins, loaded_file, use_plugins
from mllm.registry import Registry

TRUST = "MLLM_TRUST_CHECKPOINT_PLUGINS"
"""Environment variable: 1 lets every checkpoint that is opened run the plug-ins it carries."""
KEY = "plugins"
"""Key of ``config.json``."""

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A component of a checkpoint: where its config stands, the registry that knows its type, the type."""

    where: str
    registry: Registry
    type: str

    def __str__(self) -> str:
        return f"{self.registry.kind} {self.type!r}"

    @property
    def known(self) -> bool:
        return self.type in self.registry


def record_code(parts: Iterable[Part], folder: str | Path) -> list[dict[str, Any]]:
    """Copy the plug-in files that ``parts`` are defined in to ``folder``; returns the entries for ``config.json``:
    ``{file, sha256, provides}``, or ``{module, provides}`` for components of an installed package.

    Raises `CheckpointError` for two files of one name.
    """
    entries: dict[str, dict[str, Any]] = {}
    for part in parts:
        module = part.registry.get(part.type).__module__
        if module.partition(".")[0] == "mllm":
            continue
        source = loaded_file(module)
        if source is None and module == "__main__":
            _log.warning(
                "%s is defined in a script or notebook, which no checkpoint can carry: move it to a file of its own",
                part,
            )
            continue
        entry = {"module": module} if source is None else {"file": source.path.name, "sha256": source.sha256}
        known = entries.setdefault(next(iter(entry.values())), entry | {"provides": []})
        if known.get("sha256") != entry.get("sha256"):
            raise CheckpointError(f"{folder}: two plug-ins are called {entry['file']}; rename one of them")
        known["provides"].append(str(part))
        if source is not None:
            (Path(folder) / source.path.name).write_bytes(source.content)
    return list(entries.values())


def admit_code(
    where: str, entries: Sequence[Mapping[str, Any]], parts: Sequence[Part], fetch: Callable[[str], Path]
) -> None:
    """Make sure that every part's type is registered, with the code the checkpoint was made with where the user allows it.

    where: the checkpoint, for messages; entries: what `record_code` gave; fetch: file name → the checkpoint's copy.
    Raises `CheckpointError` that says which code is needed and how to allow it. Registered types from another version of a
    file are used, and said.
    """
    load_plugins()
    missing = [part for part in parts if not part.known]
    if missing and not entries:
        raise CheckpointError(
            f"{where}: {missing[0].where}: nothing registers {missing[0]}, and the checkpoint carries no plug-in. Name the file or "
            "module that defines it with --plugin (in Python: mllm.use_plugins([…])), or install its package"
        )
    if missing and os.environ.get(TRUST, "") not in ("", "0"):
        _run(where, entries, fetch)
        missing = [part for part in parts if not part.known]
        if missing:
            raise CheckpointError(
                f"{where}: {missing[0].where}: the checkpoint's plug-ins do not register {missing[0]}"
            )
    if missing:
        raise CheckpointError(_refusal(where, entries, missing, fetch))
    for entry in entries:
        if "file" in entry and not is_loaded(entry["sha256"]):
            _log.warning(
                "%s was made with another version of %s (sha256 %s…) than the one that defines %s here",
                where, entry["file"], entry["sha256"][:12], ", ".join(entry["provides"]),
            )  # fmt: skip


def _run(where: str, entries: Sequence[Mapping[str, Any]], fetch: Callable[[str], Path]) -> None:
    for entry in entries:
        if "module" in entry:
            use_plugins([entry["module"]])
            continue
        path = _copy(where, entry, fetch)
        if content_hash(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path}: was changed since the checkpoint was written (its sha256 is not the one in config.json), so {TRUST} does "
                f"not cover it. If the change is yours, name it: --plugin {path}"
            )
        use_plugins([str(path)])
    load_plugins()


def _copy(where: str, entry: Mapping[str, Any], fetch: Callable[[str], Path]) -> Path:
    name = str(entry["file"])
    if Path(name).name != name or not name.endswith(".py"):
        raise CheckpointError(f"{where}: config.json names the plug-in {name!r}; expected the plain name of a .py file")
    path = fetch(name)
    if not path.is_file():
        raise CheckpointError(
            f"{where}: its plug-in {name} is missing; copy the checkpoint again, or name your copy with --plugin"
        )
    return path


def _refusal(
    where: str, entries: Sequence[Mapping[str, Any]], missing: Sequence[Part], fetch: Callable[[str], Path]
) -> str:
    needed = [entry for entry in entries if {str(part) for part in missing} & set(entry.get("provides", []))] or entries
    codes = [entry["module"] if "module" in entry else str(_copy(where, entry, fetch)) for entry in needed]
    options = " ".join(f"--plugin {code}" for code in codes)
    return (
        f"{where}: {missing[0].where}: {missing[0]} is defined in {', '.join(codes)}, code that this checkpoint brings and that is "
        f"not run unasked. Read it, then add {options} (in Python: mllm.use_plugins({codes!r}) first), or set {TRUST}=1 to run "
        "the code of every checkpoint you open"
    )
