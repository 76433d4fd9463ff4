"""How is work over rows spread over processes?"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def pool_context() -> BaseContext:
    """Fork where there is fork (workers then share indexes and need no pickling of big tables), else spawn."""
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def chunks(total: int, size: int) -> list[range]:
    """0 … total - 1 in ranges of ``size``."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
