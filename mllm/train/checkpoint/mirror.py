"""How is a run kept on an object store too, each checkpoint there complete or absent, and how does it come back from there?

The output folder is of this machine; ``mirror: s3://…`` names its copy. Files of a checkpoint are copied as they are written, by the
process that wrote them, and its manifest last: without that it is none. A finished stage is copied likewise, its ``stage.json`` last. A
store that does not answer costs the copy, never the run.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm.data.shards.names import file_system, is_local
from mllm.data.shards.read import WAITS
from mllm.errors import CheckpointError
from mllm.recipe import Recipe
from mllm.train.checkpoint.export import DONE, is_finished
from mllm.train.checkpoint.files import MANIFEST, WRITING, found, problem_of

_log = logging.getLogger(__name__)
RECORDS = ("run.json", "metrics.jsonl")
_CHECKPOINTS = "checkpoints"


class NotCopied(Exception):
    """The store did not take a file."""


class Mirror:
    """A run's folder on a store that fsspec opens. Raises `UnavailableError` or `ConfigError` for an address that it cannot be."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self._system, self._root = file_system(self.address, where="mirror")

    def put(self, file: Path, name: str) -> None:
        """Copy a file there. Raises `NotCopied` when the store has not taken it after some minutes."""

        def copy() -> None:
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(file), self._path(name))

        self._try(copy, f"{file} to {self.address}/{name}")

    def get(self, name: str, file: Path) -> None:
        """Copy a file from there. Raises `CheckpointError`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._try(lambda: self._system.get_file(self._path(name), str(file)), f"{self.address}/{name} to {file}")
        except NotCopied as error:
            raise CheckpointError(f"mirror: {error}") from None

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder there; nothing where there is none. Raises `CheckpointError`."""
        path = self._path(folder)

        def listed() -> list[str]:
            self._system.invalidate_cache()
            try:
                entries = self._system.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries if entry.rstrip("/") != path)

        try:
            return self._try(listed, f"the list of {self.address}/{folder}")
        except NotCopied as error:
            raise CheckpointError(f"mirror: {error}") from None

    def files(self, folder: str) -> list[str]:
        """All files below a folder there, by their paths in it. Raises `CheckpointError`."""
        root = self._path(folder)
        try:
            paths = self._try(lambda: self._system.find(root), f"the list of {self.address}/{folder}")
        except NotCopied as error:
            raise CheckpointError(f"mirror: {error}") from None
        return [path.removeprefix(f"{root}/") for path in paths]

    def remove(self, folder: str, last: str) -> None:
        """Delete a folder there, the file first that makes it complete."""

        def delete() -> None:
            for path in (self._path(f"{folder}/{last}"), self._path(folder)):
                try:
                    self._system.rm(path, recursive=path != self._path(f"{folder}/{last}"))
                except FileNotFoundError:
                    continue

        self._try(delete, f"the deletion of {self.address}/{folder}")

    def checkpoints(self, stage: str) -> list[str]:
        """Names of a stage's complete checkpoints there, the oldest first."""
        folder = f"{_CHECKPOINTS}/{stage}"
        return [name for name in self.names(folder) if MANIFEST in self.names(f"{folder}/{name}")]

    def put_stage(self, folder: Path) -> None:
        """Copy a finished stage, whole or not at all, and the run's records. Raises `NotCopied`."""
        self.put_records(folder.parent)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == DONE):
            self.put(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")

    def put_records(self, folder: Path) -> None:
        """Copy what the run has recorded so far. Raises `NotCopied`."""
        for name in RECORDS:
            if (folder / name).is_file():
                self.put(folder / name, name)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def _try(self, work: Callable[[], Any], what: str) -> Any:
        waits = () if is_local(self.address) else WAITS
        for wait in (*waits, None):
            try:
                return work()
            except Exception as error:  # every store's client raises its own
                if wait is None or isinstance(error, FileNotFoundError):
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    raise NotCopied(f"{what}: {reason}") from error
                _log.warning("%s: no answer (%s); trying again in %d s", what, error, wait)
                time.sleep(wait)


def mirror_of(recipe: Recipe) -> Mirror | None:
    """Where a recipe's run is kept too; None where it is not."""
    return Mirror(recipe.mirror) if recipe.mirror else None


def holds_a_run(mirror: Mirror) -> bool:
    """Whether a run is kept there already."""
    return bool({*RECORDS, _CHECKPOINTS} & set(mirror.names()))


def bring_back(mirror: Mirror, recipe: Recipe, folder: Path, tell: Callable[[str], Any]) -> None:
    """Copy what a run needs to go on and what the output folder lacks: its records, its finished stages, and the newest complete checkpoint
    where that is newer than the newest here. Raises `CheckpointError`."""
    there = set(mirror.names())
    for name in RECORDS:
        if name in there and not (folder / name).is_file():
            mirror.get(name, folder / name)
    for stage in recipe.stages:
        if stage.name in there and DONE in mirror.names(stage.name) and not is_finished(folder / stage.name):
            tell(f"copying stage {stage.name} from {mirror.address}")
            _bring_folder(mirror, stage.name, folder / stage.name, DONE)
            continue
        here = [path.name for path in found(folder / _CHECKPOINTS / stage.name) if problem_of(path) is None]
        kept = mirror.checkpoints(stage.name)
        if kept and (not here or kept[-1] > here[-1]):
            tell(f"copying checkpoint {kept[-1]} of stage {stage.name} from {mirror.address}")
            target = folder / _CHECKPOINTS / stage.name / kept[-1]
            _bring_folder(mirror, f"{_CHECKPOINTS}/{stage.name}/{kept[-1]}", target, MANIFEST)


def _bring_folder(mirror: Mirror, name: str, target: Path, last: str) -> None:
    """A folder that is complete when it has its name: of the files that ``last`` lists."""
    temporary = target.with_name(f"{WRITING}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    mirror.get(f"{name}/{last}", temporary / last)
    for file in _listed(mirror, name, temporary / last):
        mirror.get(f"{name}/{file}", temporary / file)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _listed(mirror: Mirror, name: str, file: Path) -> list[str]:
    """A checkpoint's files by its manifest; of a stage all, for a model may carry a decoder in a folder of its own."""
    if file.name == MANIFEST:
        return sorted(json.loads(file.read_text(encoding="utf-8"))["files"])
    return [path for path in mirror.files(name) if path != file.name]
