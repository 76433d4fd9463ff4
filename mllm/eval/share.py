"""Which questions does a process answer next, when several share the questions of all tasks?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mllm.errors import DataError
from mllm.eval.launch import RUN_ID

CELL = 8
"""Questions that are taken together at least, where a batch is not larger."""
_MOST_CELLS = 128


class Share:
    """One process's part in a queue of all questions that stands in the output folder, so that it also serves several machines
    with a common disk: whoever is free takes the next cells of a task, many at its beginning and few at its end, and goes on to the
    next task when none is left. Nobody waits for the slowest until the whole run is done.

    A cell is taken by making a symbolic link that names the taker, which one process alone can do on a local disk and on NFS. What a
    process had taken in an earlier, stopped run it gives back when it starts anew; answers decide what is left to ask.
    """

    def __init__(self, folder: Path, rank: int, world: int, *, cell: int = CELL):
        self.place, self.rank, self.world, self.cell = folder / ".queue", rank, world, max(CELL, cell)
        self.place.mkdir(parents=True, exist_ok=True)
        self.spent: dict[str, tuple[float, int]] = {}
        self._mark(rank).unlink(missing_ok=True)
        for claim in self.place.glob("*.cell"):
            if self._taker(claim) in (rank, None) or self._taker(claim) >= world:  # type: ignore[operator]
                claim.unlink(missing_ok=True)

    def take(self, name: str, count: int) -> Iterator[list[int]]:
        """Positions among ``count`` questions of the task and way ``name``, some at a time, until none is left."""
        cells, number = -(-count // self.cell), 0
        while number < cells:
            most = max(1, min(_MOST_CELLS, (cells - number) // (2 * self.world)))
            taken: list[int] = []
            while len(taken) < most and number < cells:
                if self._claim(name, number):
                    taken.append(number)
                number += 1
            if taken:
                yield [k for c in taken for k in range(c * self.cell, min((c + 1) * self.cell, count))]

    def num_taken(self, name: str) -> int:
        """Questions of a task that anybody has taken, answered or not."""
        return self.cell * sum(1 for _ in self.place.glob(f"{_safe(name)}.*.cell"))

    def _claim(self, name: str, number: int) -> bool:
        try:
            (self.place / f"{_safe(name)}.{number:07d}.cell").symlink_to(str(self.rank))
        except FileExistsError:
            return False
        return True

    @staticmethod
    def _taker(claim: Path) -> int | None:
        try:
            return int(str(claim.readlink()))
        except (OSError, ValueError):
            return None

    def _mark(self, rank: int) -> Path:
        return self.place / f"{rank:04d}.done"

    def leave(self, runs: Sequence[str]) -> None:
        """Say that this process is through with all tasks (``asked``: what they were), with ``spent``: seconds and answers of each."""
        part = self.place / f".{self.rank:04d}.part"
        part.write_text(json.dumps({"token": _token(runs), "spent": self.spent}), encoding="utf-8")
        part.replace(self._mark(self.rank))

    def wait(self, runs: Sequence[str], patience: float = 24 * 3600) -> dict[str, tuple[float, int]]:
        """Return when every process has left this very run: seconds and answers of all processes together, by task and way. Raises
        `DataError` after ``patience`` seconds, naming who is missing."""
        token, until = _token(runs), time.monotonic() + patience
        while True:
            left = [self._read(rank) for rank in range(self.world)]
            absent = [rank for rank, mark in enumerate(left) if mark.get("token") != token]
            if not absent:
                break
            if time.monotonic() > until:
                names = ", ".join(map(str, absent))
                raise DataError(f"no result from process {names} of {self.world} after {patience / 3600:g} h")
            time.sleep(0.2)
        shutil.rmtree(self.place, ignore_errors=True)
        spent: dict[str, tuple[float, int]] = {}
        for mark in left:
            for name, (seconds, count) in mark["spent"].items():
                before = spent.get(name, (0.0, 0))
                spent[name] = before[0] + seconds, before[1] + count
        return spent

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads(self._mark(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def _safe(name: str) -> str:
    return quote(name, safe="").replace(".", "%2E")


def _token(runs: Sequence[str]) -> str:
    """The launch and the questions it belongs to, so that what an earlier, stopped run left is not taken for an answer."""
    launch = [os.environ.get(name, "") for name in (RUN_ID, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    return hashlib.sha256(json.dumps([launch, list(runs)]).encode()).hexdigest()
