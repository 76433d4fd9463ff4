"""How is work over rows spread over processes?"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

_work: Any = None
"""In a process of `spread`: what it does to a part."""


def pool_context() -> BaseContext:
    """Fork where there is fork (workers then share indexes and need no pickling of big tables), else spawn."""
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def chunks(total: int, size: int) -> list[range]:
    """0 … total - 1 in ranges of ``size``."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def spread(
    work: Callable[[Part], Result], parts: Iterable[Part], processes: int, *, at_once: int = 1
) -> Iterator[Result]:
    """``map(work, parts)`` in order, over so many processes (up to 1: in this one).

    Forked processes inherit ``work`` and what it holds; only the parts travel. at_once: parts that travel together.
    """
    if processes <= 1:
        yield from map(work, parts)
        return
    with ProcessPoolExecutor(processes, mp_context=pool_context(), initializer=_begin, initargs=(work,)) as pool:
        yield from pool.map(_do, parts, chunksize=at_once)


def _begin(work: Any) -> None:
    """One thread each. OpenMP's threads do not survive a fork: where the parent has used them, the first parallel loop of torch in
    a child would wait for them forever. Tokenizers' threads would say on stderr that they were forked."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _do(part: Any) -> Any:
    return _work(part)
