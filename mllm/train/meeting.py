"""How do the machines of one run find each other, and how does one hear that another is gone?

The command of the first machine listens at ``--rendezvous``; the others come to it. There they exchange what must be equal before any
process starts, then beat every two seconds. A machine that ends leaves its last word, one that is cut off falls silent: either way the
others end too, with one line. The training processes meet at the same address.
"""

from __future__ import annotations

import importlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from mllm.errors import ConfigError, Interrupted, MllmError
from mllm.machines import Machines
from mllm.progress import phase

BEAT_SECONDS = 2.0
SILENT_SECONDS = 120.0
"""A machine that is not heard for so long is lost; a network may drop for a minute."""
COMING_SECONDS = 600.0
_LEAVING_SECONDS = 15.0
GO_ON = "Checkpoints are complete: the same command with --resume goes on, also on fewer machines (--nodes and --node-rank from 0)"


class MachineLost(MllmError, RuntimeError):
    """Another machine of the run ended or fell silent; the message says which and how to go on."""


class Meeting:
    """One machine's end of the line to the others; made by `meeting`."""

    def __init__(self, machines: Machines, store: Any):
        self.machines, self.store = machines, store
        self.names: list[str] = []
        self._heard: dict[int, tuple[int, float]] = {}
        self._news: str | None = None
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def meet(self) -> None:
        """Wait for all machines. Raises `ConfigError` on each when they were started unlike or one does not come."""
        machines, store = self.machines, self.store
        if store.add(f"taken/{machines.node_rank}", 1) > 1:
            raise ConfigError(f"--node-rank {machines.node_rank}: another machine has it; each has its own, from 0")
        about = {"host": socket.gethostname(), "--nodes": machines.nodes, "--processes": machines.processes}
        store.set(f"machine/{machines.node_rank}", json.dumps(about))
        with phase(f"waiting for {machines.nodes} machines at {machines.host}:{machines.port}") as waiting:

            def missing() -> list[int]:
                result = [rank for rank in range(machines.nodes) if not store.check([f"machine/{rank}"])]
                waiting.so_far = f"{machines.nodes - len(result)} are here"
                return result

            if not _within(COMING_SECONDS, lambda: not missing()):
                raise ConfigError(
                    f"--nodes {machines.nodes}: machine(s) {', '.join(map(str, missing()))} did not come to "
                    f"{machines.host}:{machines.port} within {COMING_SECONDS / 60:.0f} minutes; is the same command running "
                    "there, with --node-rank of its own, and is the port open?"
                )
        everyone = [json.loads(store.get(f"machine/{rank}")) for rank in range(machines.nodes)]
        self.names = [f"machine {rank} ({about['host']})" for rank, about in enumerate(everyone)]
        store.set(f"read/{machines.node_rank}", "")
        if machines.node_rank == 0:  # it keeps what the others have yet to read
            readers = [f"read/{rank}" for rank in range(machines.nodes)]
            _within(_LEAVING_SECONDS, lambda: store.check(readers))
        for key in ("--nodes", "--processes"):
            for name, about in zip(self.names, everyone):
                if about[key] != everyone[0][key]:
                    raise ConfigError(
                        f"{key} is {about[key]} on {name} and {everyone[0][key]} on {self.names[0]}; every machine takes the same"
                    )
        self._heard = {rank: (0, time.monotonic()) for rank in range(machines.nodes) if rank != machines.node_rank}
        self._heart.start()

    def news(self) -> str | None:
        """A line about a machine that ended or fell silent, None while all is well."""
        return self._news

    def wait_for_news(self) -> str | None:
        """As `news`, when something has just gone wrong here that another machine may be the cause of."""
        _within(
            4 * BEAT_SECONDS, lambda: self._news is not None or self._silent(3 * BEAT_SECONDS), every=BEAT_SECONDS / 8
        )
        return self._news or self._silent(3 * BEAT_SECONDS)

    def leave(self, last_word: str | None) -> None:
        """Tell the others that this machine is done, or what ended it."""
        try:
            self.store.set(f"end/{self.machines.node_rank}", last_word or "")
            if self.machines.node_rank == 0:  # with it goes the line: the others read first, or finish
                ends = [f"end/{rank}" for rank in range(self.machines.nodes)]
                limit = _LEAVING_SECONDS if last_word else SILENT_SECONDS
                _within(limit, lambda: self.store.check(ends) or self._silent(limit) is not None)
        except RuntimeError:  # the line is gone: nobody is left to tell
            pass
        self._over.set()
        if self._heart.is_alive():
            self._heart.join()

    def _silent(self, limit: float) -> str | None:
        now = time.monotonic()
        for rank, (_, since) in self._heard.items():
            if now - since > limit:
                return f"{self.names[rank]} is lost: not heard for {now - since:.0f} s. {GO_ON}"
        return None

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._listen()
            except RuntimeError:
                self._news = self._news or f"{self.names[0]} is lost: the line to it broke. {GO_ON}"
                return

    def _listen(self) -> None:
        self.store.add(f"beat/{self.machines.node_rank}", 1)
        for rank, (count, _) in list(self._heard.items()):
            if self.store.check([f"end/{rank}"]):
                last_word = self.store.get(f"end/{rank}").decode()
                del self._heard[rank]
                if last_word:
                    self._news = self._news or f"{self.names[rank]} ended the run: {last_word}"
            elif (beats := self.store.add(f"beat/{rank}", 0)) != count:
                self._heard[rank] = (beats, time.monotonic())
        self._news = self._news or self._silent(SILENT_SECONDS)


@contextmanager
def meeting(machines: Machines | None) -> Iterator[Meeting | None]:
    """The machines, met; None for one machine. Whatever ends the block is told to the others.

    Raises `ConfigError` when they cannot meet or were started unlike.
    """
    if machines is None:
        yield None
        return
    met = Meeting(machines, _open_store(machines))
    last_word: str | None = "it was ended"
    try:
        met.meet()
        yield met
        last_word = None
    except (MllmError, OSError) as error:
        last_word = str(error).partition("\n")[0]
        raise
    except (KeyboardInterrupt, Interrupted):
        last_word = f"it was interrupted. {GO_ON}"
        raise
    finally:
        met.leave(last_word)


def _open_store(machines: Machines) -> Any:
    dist: Any = importlib.import_module("torch.distributed")
    listens = machines.node_rank == 0
    try:
        with phase(f"coming to {machines.host}:{machines.port}", when=not listens):
            return dist.TCPStore(
                machines.host,
                machines.port,
                is_master=listens,
                wait_for_workers=False,
                timeout=timedelta(seconds=COMING_SECONDS),
            )
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        text = str(error).partition("\n")[0]
        if "EADDRINUSE" in text or "address already in use" in text:
            raise ConfigError(
                f"--rendezvous: port {machines.port} of this machine is in use by another program; choose another, the same "
                f"on all machines, as {machines.host}:{machines.port + 1}"
            ) from None
        raise ConfigError(
            f"--rendezvous {machines.host}:{machines.port} cannot be reached ({text}); is it the machine with --node-rank 0, is the "
            "command running there, and is the port open?"
        ) from None


def _within(seconds: float, holds: Callable[[], Any], *, every: float = 0.2) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
