"""How does a run end with a checkpoint when it is asked to stop, by Ctrl-C, SIGTERM (schedulers, containers) or SIGUSR1 (SLURM)?

Every process of a run may be told, or one alone: the step's sum says it to all, so that they stop behind the same step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TOLD_ONCE = 1.0
"""Seconds within which another signal is the same request: a terminal and a launcher both pass Ctrl-C on."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Asked:
    """What this process was told so far."""

    def __init__(self) -> None:
        self.by = ""
        """The first signal's name; empty: to go on."""
        self.at = 0.0


@contextmanager
def asked_to_stop(tell: bool, also: Callable[[int], None] | None = None, *, patient: bool = False) -> Iterator[Asked]:
    """While the block runs, a signal asks for a stop and does not end the process; a second one, a second or more later, does what it
    did before.

    Args:
        tell: say on stderr what happens now.
        also: called with the first signal.
        patient: a second one changes nothing either (a launcher decides).
    """
    asked, before = Asked(), {}
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only there can signals be taken
        return

    def heard(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked.by:
            if patient or now - asked.at < TOLD_ONCE:
                return
            former = before[number]
            signal.signal(number, former)
            if callable(former):
                former(number, frame)
            else:
                os.kill(os.getpid(), number)
            return
        asked.by, asked.at = signal.Signals(number).name, now
        if tell:  # no lock of a stream or a display may be waited for here
            os.write(
                2,
                f"\n{_name(number)}: stopping behind this step, with a checkpoint; once more: at once, without\n".encode(),
            )
        if also is not None:
            also(number)

    for number in _SIGNALS:
        former = signal.getsignal(number)
        if (
            former is not None
            and former is not signal.SIG_IGN
            and (number != signal.SIGUSR1 or former is signal.SIG_DFL)
        ):
            before[number] = former
            signal.signal(number, heard)
    try:
        yield asked
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def started_by_launcher() -> bool:
    """Whether this process was started by ours, which is told as well and says when to end at once."""
    return multiprocessing.parent_process() is not None


def outlive_the_step(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: what tells all processes of a job to stop must not break the batch that is being loaded; they end
    with the training process. A second SIGTERM ends this one."""

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, once if number == signal.SIGTERM else signal.SIG_IGN)
