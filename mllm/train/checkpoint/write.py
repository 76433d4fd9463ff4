"""How is a checkpoint written, while training waits or goes on?

Every process writes its share under the checkpoint's temporary name; when all are done, the main process closes it with the manifest and
gives it its name. Written in the background, the share is copied first and a thread writes the copies: only files, for processes may
speak to each other from the training thread alone. The training thread closes the checkpoint after the step at which all have written.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mllm import distributed
from mllm.errors import CheckpointError
from mllm.modes import by_umask
from mllm.train.checkpoint.copies import HostCopies, host_copy
from mllm.train.checkpoint.files import (
    MANIFEST,
    WRITING,
    describe,
    found,
    remove,
    sync_directory,
    sync_file,
    write_text,
)
from mllm.train.checkpoint.mirror import Mirror, NotCopied
from mllm.train.checkpoint.resume import BESIDE, FORMAT, WEIGHTS, Progress
from mllm.train.engine.base import Engine, Fragment

_log = logging.getLogger(__name__)
_FILE_BYTES = 2 << 30  # one tensor file's size: bounds the host memory that writing takes
_Copy = Callable[[Tensor], Tensor]
_Piece = tuple[str, dict[str, Tensor] | str]
"""A file's name, and the tensors or the text that it holds."""


class CheckpointWriter:
    """Writes ``folder/step-…`` and drops all but the newest ``keep``. All processes must call its methods alike, `done` and
    `abandon` aside. background: `save` returns when this process's share is copied in its memory; the checkpoint is there after
    `finish`.

    `save` and `finish` raise `CheckpointError` on every process when one of them cannot write (full disk); earlier checkpoints stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2, background: bool = False, mirror: Mirror | None = None):
        self.folder, self.keep, self.background, self.mirror = folder, keep, background, mirror
        machine = distributed.own_folder_of()
        self._written_by = {"machine": machine} if machine else {}
        self._not_copied = ""
        self._copies: HostCopies | None = None
        self._thread: threading.Thread | None = None
        self._target = self._temporary = folder
        self._progress: dict[str, Any] = {}
        self._entries: dict[str, Any] = {}
        self._error = ""

    def save(self, engine: Engine, progress: Progress, *, beside: dict[str, Tensor] | None = None) -> Path:
        """Write a checkpoint, or begin to. beside: what a stage keeps besides its model, on the CPU; the main process writes it."""
        self.finish()
        name, rank = f"step-{progress.step:08d}", distributed.rank()
        self._target, self._temporary = self.folder / name, self.folder / f"{WRITING}{name}"
        self._progress, self._entries, self._error, self._not_copied = asdict(progress), {}, "", ""
        if self.mirror is not None and distributed.is_main():
            with self._copying():  # of a former start that went as far
                self.mirror.remove(self._there(name), MANIFEST)
        try:
            if distributed.keeps_folder():
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir()
        except OSError as problem:
            self._error = str(problem)
        self._agree()
        copies = self._copies_of(engine)
        share: Iterable[_Piece] = _share(rank, engine, beside if rank == 0 else None, copies or host_copy)
        if copies is not None:
            copies.begin()
            share = list(share)  # copies: the next update changes what they were made from
            copies.wait()
            self._thread = threading.Thread(target=self._write, args=(share,), name="checkpoint")
            self._thread.start()
            return self._target
        self._write(share)
        self._close()
        return self._target

    def _copies_of(self, engine: Engine) -> HostCopies | None:
        """Where copies wait to be written in the background; None where they are written at once."""
        if self.background and self._copies is None:
            self._copies = HostCopies(engine.device)
        return self._copies

    def done(self) -> bool:
        """Whether this process has written its share of a checkpoint that `finish` has yet to close."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and close it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._close()

    def abandon(self) -> None:
        """Leave no thread behind when training has failed; what it wrote is no checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, share: Iterable[_Piece]) -> None:
        try:
            for name, content in share:
                path = self._temporary / name
                if isinstance(content, str):
                    write_text(path, content)
                else:
                    save_file(content, path)
                    by_umask(path)
                    sync_file(path)
                self._entries[name] = describe(path) | self._written_by
                if self.mirror is not None and not self._not_copied:
                    with self._copying():
                        self.mirror.put(path, self._there(f"{self._target.name}/{name}"))
        except (OSError, SafetensorError) as problem:
            self._error = str(problem)

    def _close(self) -> None:
        everything = self._agree()
        if distributed.keeps_folder():
            try:
                files = {name: entry for part in everything for name, entry in part.items()}
                manifest = {"format": FORMAT, "progress": self._progress, "files": files}
                write_text(self._temporary / MANIFEST, json.dumps(manifest, indent=1))
                if self._target.exists():
                    remove(self._target)
                self._temporary.rename(self._target)
                sync_directory(self.folder)
            except OSError as problem:
                self._error = str(problem)
        self._agree()
        if distributed.keeps_folder():
            for old in found(self.folder)[: -self.keep]:
                remove(old)
        self._complete_mirror()
        distributed.barrier()

    def _there(self, name: str) -> str:
        """A name in the mirror: the run's folder holds ``checkpoints/<stage>``."""
        return f"{self.folder.parent.name}/{self.folder.name}/{name}"

    @contextmanager
    def _copying(self) -> Iterator[None]:
        try:
            yield
        except NotCopied as error:
            self._not_copied = str(error)

    def _complete_mirror(self) -> None:
        """The manifest of a checkpoint whose files all processes have copied, and the run's records; then the old ones go."""
        if self.mirror is None:
            return
        problems = [problem for problem in distributed.gather_objects(self._not_copied) if problem]
        if not distributed.is_main():
            return
        mirror, name = self.mirror, self._target.name
        if not problems:
            self._not_copied = ""
            with self._copying():
                mirror.put_records(self.folder.parent.parent)
                mirror.put(self._target / MANIFEST, self._there(f"{name}/{MANIFEST}"))
                kept = [old.name for old in found(self.folder)]
                for old in mirror.names(self._there("").rstrip("/")):
                    if old.startswith("step-") and old not in kept:
                        mirror.remove(self._there(old), MANIFEST)
            problems = [self._not_copied] if self._not_copied else []
        if problems:
            _log.warning("checkpoint %s is on disk and not in the mirror (%s)", self._target, problems[0])

    def _agree(self) -> list[dict[str, Any]]:
        """What every process wrote; raises on all of them when one had an error."""
        answers = distributed.gather_objects((self._error, self._entries))
        for number, (problem, _) in enumerate(answers):
            if problem:
                if distributed.keeps_folder():
                    shutil.rmtree(self._temporary, ignore_errors=True)
                earlier = [path.name for path in found(self.folder)]
                raise CheckpointError(
                    f"{self._target}: process {number} could not write the checkpoint ({problem}). "
                    + (
                        f"The previous one is intact ({earlier[-1]}); free space, then go on with --resume"
                        if earlier
                        else "The stage has no earlier one, so --resume begins it again: free space first, or choose another output"
                    )
                )
        return [entries for _, entries in answers]


def save_checkpoint(
    folder: Path, engine: Engine, progress: Progress, *, keep: int = 2, beside: dict[str, Tensor] | None = None
) -> Path:
    """One checkpoint, written while the caller waits (`CheckpointWriter`)."""
    return CheckpointWriter(folder, keep=keep).save(engine, progress, beside=beside)


def _share(rank: int, engine: Engine, beside: dict[str, Tensor] | None, copy: _Copy) -> Iterator[_Piece]:
    """The files of one process, each copied from the engine when its turn comes."""
    yield from _fragments(rank, engine, copy)
    yield from _local(rank, engine, copy)
    if beside:
        yield BESIDE, beside


def _fragments(rank: int, engine: Engine, copy: _Copy) -> Iterator[_Piece]:
    """This process's fragments, and the index that says what is where."""
    index: list[dict[str, Any]] = []
    pending: dict[str, Tensor] = {}
    files = size = 0
    for fragment in engine.fragments():
        entry, copies = _fragment(fragment, files, copy)
        index.append(entry)
        pending |= copies
        size += sum(part.numel() * part.element_size() for part in copies.values())
        if size >= _FILE_BYTES:
            yield f"state-{rank:05d}-{files:04d}.safetensors", pending
            pending, size, files = {}, 0, files + 1
    if pending:
        yield f"state-{rank:05d}-{files:04d}.safetensors", pending
    yield f"index-{rank:05d}.json", json.dumps(index)


def _fragment(fragment: Fragment, file: int, copy: _Copy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A fragment's entry in the index, and copies of its tensors."""
    numbers: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    copies: dict[str, Tensor] = {}
    for key, value in [(WEIGHTS, fragment.flat), *fragment.state.items()]:
        if not isinstance(value, Tensor) or value.dim() == 0:
            number = value.item() if isinstance(value, Tensor) else value
            if isinstance(number, (int, float, bool)):
                numbers[key] = {"value": number, "tensor": isinstance(value, Tensor)}
            continue
        whole = value.numel() != fragment.like.numel()
        piece = value if whole else value.reshape(-1)[fragment.offset : fragment.offset + fragment.length]
        copies[f"{fragment.name}|{key}"] = copy(piece)
        tensors[key] = {"file": file, "whole": whole}
    place = {"name": fragment.name, "start": fragment.start, "length": fragment.length}
    return {**place, "tensors": tensors, "numbers": numbers}, copies


def _local(rank: int, engine: Engine, copy: _Copy) -> Iterator[_Piece]:
    """What differs between processes: random generators and the model's persistent buffers."""
    persistent = set(engine.model.state_dict())
    tensors = {f"buffer.{n}": copy(b) for n, b in engine.model.named_buffers() if n in persistent}
    tensors["rng.torch"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(engine.device)
    yield f"local-{rank:05d}.safetensors", tensors
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
    }
    yield f"random-{rank:05d}.json", json.dumps(state)
