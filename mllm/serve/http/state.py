"""Is the server going away, and how many requests still run? What its processes and its supervisor tell each other."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import tempfile
from pathlib import Path

FOLDER = "MLLM_SERVER_STATE"
"""Environment variable: the folder that the processes of a server share."""
_DRAINING, _ENDING, _COUNT = "draining", "ending", ".running"
_POLL = 0.2


class ServerState:
    """The shared folder of one server: two marks, and a counter of running requests for each process."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def make(cls) -> ServerState:
        """A new folder."""
        return cls(Path(tempfile.mkdtemp(prefix="mllm-serve-")))

    def drain(self) -> None:
        """From now on new requests are refused and the server is not ready."""
        (self.folder / _DRAINING).touch()

    def end(self) -> None:
        """From now on running requests are ended too."""
        (self.folder / _ENDING).touch()

    def running(self) -> int:
        """Requests that run in all processes."""
        counters = [file.read_bytes() for file in self.folder.glob(f"*{_COUNT}")]
        return sum(struct.unpack("q", kept)[0] for kept in counters if len(kept) == 8)  # shorter: just being made


class ProcessState:
    """One process's side of it. Without a folder (tests, a server that nobody supervises) nothing ever drains."""

    def __init__(self, folder: str | None = None):
        self.folder = Path(folder) if folder else None
        self._counter: mmap.mmap | None = None
        self._count = 0
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def of_environment(cls) -> ProcessState:
        """The state of the server that this process belongs to."""
        return cls(os.environ.get(FOLDER))

    @property
    def draining(self) -> bool:
        """Whether the server is going away."""
        return self.folder is not None and (self.folder / _DRAINING).exists()

    def running(self) -> int:
        """Requests that run in all processes of the server."""
        return ServerState(self.folder).running() if self.folder is not None else self._count

    def enter(self) -> None:
        """A request begins."""
        self._add(1)

    def leave(self) -> None:
        """A request has ended."""
        self._add(-1)

    async def ended(self) -> None:
        """Returns when running requests are to be ended. One task of the running event loop looks for all requests; after one that
        failed the next request makes another."""
        if self.folder is None:
            await asyncio.Event().wait()
        watch = self._watch
        failed = watch is not None and watch.done() and (watch.cancelled() or watch.exception() is not None)
        if watch is None or failed or watch.get_loop() is not asyncio.get_running_loop():
            watch = self._watch = asyncio.create_task(self._look())
        await asyncio.shield(watch)

    async def _look(self) -> None:
        assert self.folder is not None
        while not (self.folder / _ENDING).exists():
            await asyncio.sleep(_POLL)

    def _add(self, number: int) -> None:
        if self.folder is None:
            return
        if self._counter is None:
            path = self.folder / f"{os.getpid()}{_COUNT}"
            path.write_bytes(struct.pack("q", 0))
            with path.open("r+b") as file:
                self._counter = mmap.mmap(file.fileno(), 8)
        self._count += number
        struct.pack_into("q", self._counter, 0, self._count)
