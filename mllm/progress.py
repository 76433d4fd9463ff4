"""What is a long start doing right now? Phases, told in lines on stderr while they last."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HEARTBEAT_SECONDS = 5.0
_WORTH_TELLING_SECONDS, _WORTH_TELLING_BYTES = 1.0, 10**8
_STARTED = "MLLM_STARTED"
"""Environment variable with the command's start, in seconds since 1970: processes it starts count from there too."""

_telling = False


@dataclass
class Phase:
    """What a phase may say of itself while it lasts and when it ends."""

    num_bytes: int = 0
    """Bytes read; the last line then has their number and rate."""
    so_far: str = ""
    """How far it is, for the lines that say that it still lasts."""


def begin() -> None:
    """Tell phases from now on, on the first process of a run only. Seconds count from the first call, also in processes
    started later."""
    global _telling
    _telling = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault(_STARTED, repr(time.time()))


def end() -> None:
    """Tell no more phases, and count seconds anew at the next `begin`."""
    global _telling
    _telling = False
    os.environ.pop(_STARTED, None)


def tell(text: str) -> None:
    """One line, with the seconds since the start; nothing before `begin`."""
    if _telling:
        passed = time.time() - float(os.environ[_STARTED])
        sys.stderr.write(f"[{passed:6.1f} s] {text}\n")
        sys.stderr.flush()


@contextmanager
def phase(what: str, *, when: bool = True) -> Iterator[Phase]:
    """Tell that ``what`` begins, that it still lasts (every few seconds), and what it took where that is worth a line.

    when: False for a phase that is not to be told. The `Phase` it gives may be filled until the block ends.
    """
    result = Phase()
    if not (when and _telling):
        yield result
        return
    tell(f"{what} …")
    began, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            so_far = f": {result.so_far}" if result.so_far else ""
            tell(f"  still {what} ({time.monotonic() - began:.0f} s){so_far}")

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield result
    finally:
        over.set()
        heart.join()
    took = time.monotonic() - began
    if result.num_bytes >= _WORTH_TELLING_BYTES:
        size = result.num_bytes / 1e9
        tell(f"  {what}: {size:.2f} GB in {took:.1f} s, {size / max(took, 1e-9):.2f} GB/s")
    elif took > _WORTH_TELLING_SECONDS:
        tell(f"  {what}: {took:.1f} s")
