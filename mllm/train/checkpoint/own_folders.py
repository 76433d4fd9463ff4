"""Where every machine has an output folder of its own, how do all come to hold what the run reads?

Each machine keeps its processes' share of a checkpoint, and the manifest, which names all files and who wrote them. Before a checkpoint or
a finished stage is read, the machines give each other what they lack: every folder is then as one that all share.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mllm import distributed
from mllm.errors import CheckpointError, ConfigError
from mllm.train.checkpoint import run_lock
from mllm.train.checkpoint.export import DONE, is_finished
from mllm.train.checkpoint.files import MANIFEST, WRITING, describe, found, step_of

_CHUNK = 64 << 20


class OwnFolders:
    """The machines of a run, of each the process that keeps its folder. All processes must make it, and call its methods, alike."""

    def __init__(self) -> None:
        places = distributed.gather_objects((socket.gethostname(), os.environ.get("LOCAL_RANK", "0") == "0"))
        self.keepers = [rank for rank, (_, keeps) in enumerate(places) if keeps]
        self.names = [f"machine {number} ({places[rank][0]})" for number, rank in enumerate(self.keepers)]
        self._group: Any = dist.new_group(self.keepers, backend="gloo")
        rank = distributed.rank()
        self._number = self.keepers.index(rank) if rank in self.keepers else None
        self.here = self.names[self._machine_of(rank)]

    @contextmanager
    def only_run_in(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of ``folder`` on every machine; of the first one its command does. Raises `ConfigError` on all."""
        problem = ""
        with ExitStack() as stack:
            try:
                stack.enter_context(run_lock.only_run_in(folder, asks=bool(self._number)))
            except ConfigError as error:
                problem = str(error)
            problems = [text for text in distributed.gather_objects(problem) if text]
            if problems:
                raise ConfigError(problems[0])
            yield

    def give_stages(self, folder: Path, stages: list[str], *, extend: bool = False) -> None:
        """Before a resume: every finished stage, and of the others (extend: of the last) the newest checkpoint of which nothing is missing.

        Raises `CheckpointError` on all, naming the file and the machine that wrote it, when the machines together lack some of
        every checkpoint.
        """
        for stage in stages:
            if not self.give_finished(folder / stage) or (extend and stage == stages[-1]):
                self._give_checkpoint(folder / "checkpoints" / stage)

    def give_finished(self, folder: Path) -> bool:
        """A finished stage's folder to all that lack it; False: no machine has it."""
        kept = self._of_machines(lambda: _finished_files(folder))
        sizes = next((files for files in kept if files is not None), None)
        if sizes is not None:
            self._give(folder, sizes, [set() if files is None else set(files) for files in kept], last=DONE)
        return sizes is not None

    def give_file(self, path: Path, *, writer: int | None = None) -> None:
        """One file beside checkpoints and stages to all machines that lack it or have another one.

        writer: the process that wrote it; None: the first machine that has one gives it. Nothing is done where it is not.
        """
        kept = self._of_machines(lambda: describe(path) if path.is_file() else None)
        number = next((n for n, entry in enumerate(kept) if entry), 0) if writer is None else self._machine_of(writer)
        wanted, problem = kept[number], ""
        if wanted is not None and self._number is not None and any(entry != wanted for entry in kept):
            source = path if self._number == number else None
            target = path.with_name(f"{WRITING}{path.name}") if kept[self._number] != wanted else None
            problem = self._pass(number, source, target, wanted["size"])
            if target is not None and not problem:
                target.replace(path)
        self._refuse(path, problem)

    def _machine_of(self, rank: int) -> int:
        return sum(keeper <= rank for keeper in self.keepers) - 1  # a machine's processes are numbered in a row

    def _refuse(self, path: Path, problem: str) -> None:
        problems = [text for text in distributed.gather_objects(problem) if text]
        if problems:
            raise CheckpointError(f"{path}: could not be copied between the machines ({problems[0]})")

    def _give_checkpoint(self, folder: Path) -> None:
        names = {name for some in self._of_machines(lambda: [path.name for path in found(folder)]) for name in some}
        problem = ""
        for name in sorted(names, key=lambda name: step_of(Path(name)), reverse=True):
            lacking = self._give_step(folder / name)
            if not lacking:
                return
            problem = problem or f"{folder / name}: {lacking}"
        if problem:
            raise CheckpointError(
                f"{problem}; no earlier checkpoint is complete. Resume with the machines that wrote it, each with its own folder, or "
                f"from a mirror (mirror=s3://…); or delete {folder} on all to start the stage again"
            )

    def _give_step(self, folder: Path) -> str:
        """What is missing of a checkpoint on all machines; empty, and given to all, when nothing is."""
        texts = self._of_machines(lambda: _manifest(folder))
        text = next((text for text in texts if text), "")
        if not text:
            return f"{MANIFEST} is missing on all machines"
        files = json.loads(text)["files"]
        whole = self._of_machines(lambda: _intact(folder, files) if _manifest(folder) == text else set())
        for name, entry in files.items():
            if not any(name in kept for kept in whole):
                return f"{name}, which {entry.get('machine', 'a machine')} wrote, is whole on none of these machines"
        sizes = {name: entry["size"] for name, entry in files.items()} | {MANIFEST: len(text.encode())}
        kept = [names | {MANIFEST} if mine == text else set() for names, mine in zip(whole, texts)]
        self._give(folder, sizes, kept, last=MANIFEST)
        return ""

    def _of_machines(self, value: Callable[[], Any]) -> list[Any]:
        """Every machine's value, asked of the process that keeps its folder."""
        gathered = distributed.gather_objects(value() if self._number is not None else None)
        return [gathered[rank] for rank in self.keepers]

    def _give(self, folder: Path, sizes: dict[str, int], kept: list[set[str]], *, last: str) -> None:
        """Every file to the machines that do not keep it; a folder there is complete or absent."""
        problem = ""
        if self._number is not None and any(set(sizes) - names for names in kept):
            mine, temporary = kept[self._number], folder.with_name(f"{WRITING}{folder.name}")
            lacks = bool(set(sizes) - mine)
            try:
                if lacks:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
            for name in sorted(sizes, key=lambda name: (name == last, name)):
                giver = next(number for number, names in enumerate(kept) if name in names)
                if all(name in names for names in kept):
                    continue
                source = folder / name if giver == self._number else None
                target = temporary / name if name not in mine else None
                problem = self._pass(giver, source, target, sizes[name]) or problem
            if lacks and not problem:
                problem = _complete(folder, temporary, mine)
        self._refuse(folder, problem)

    def _pass(self, giver: int, source: Path | None, target: Path | None, size: int) -> str:
        """One file from one machine to all that have a ``target``; what went wrong, after which the rest is passed all the same: the
        others wait for it."""
        problem, reading, writing = "", None, None
        try:
            if source is not None:
                reading = source.open("rb")
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                writing = target.open("wb")
        except OSError as error:
            problem = str(error)
        try:
            for start in range(0, size, _CHUNK):
                length = min(_CHUNK, size - start)
                data = torch.empty(length, dtype=torch.uint8)
                if reading is not None:
                    part = bytearray(reading.read(length))
                    if len(part) == length:
                        data = torch.frombuffer(part, dtype=torch.uint8)
                    else:
                        problem = f"{source} was shortened meanwhile"
                dist.broadcast(data, src=self.keepers[giver], group=self._group)
                if writing is not None and not problem:
                    try:
                        writing.write(data.numpy().tobytes())
                    except OSError as error:
                        problem = str(error)
        finally:
            for file in (reading, writing):
                if file is not None:
                    file.close()
        return problem


def _finished_files(folder: Path) -> dict[str, int] | None:
    """Path in the folder → bytes of all files of a finished stage; None where it is not whole."""
    try:
        if not is_finished(folder):
            return None
    except CheckpointError:
        return None
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _manifest(folder: Path) -> str:
    """A checkpoint's manifest; empty where there is none that can be read."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):
        return ""
    return text


def _intact(folder: Path, files: dict[str, Any]) -> set[str]:
    """Those of a checkpoint's files that are here as they were written."""

    def same(name: str, entry: dict[str, Any]) -> bool:
        path = folder / name
        return (
            path.is_file()
            and path.stat().st_size == entry["size"]
            and describe(path) == {key: entry[key] for key in ("size", "hash")}
        )

    return {name for name, entry in files.items() if same(name, entry)}


def _complete(folder: Path, temporary: Path, mine: set[str]) -> str:
    """Let a folder of received files, and those of ``mine`` that were here before, take its name; what went wrong."""
    try:
        for name in mine:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(temporary / name)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        return str(error)
    return ""
