"""How do benchmarks run many small trainings side by side, on one GPU or on CPU cores?"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch


def choose_device(name: str | None) -> str:
    """``cuda`` or ``cpu``; None: CUDA where there is one. With ``cpu`` this process and those it starts see no GPU.

    Called before anything touches CUDA.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here; use --device cpu")
    return name


def run_jobs(
    work: Callable[[Any], dict[str, Any]],
    jobs: Sequence[Any],
    *,
    processes: int = 1,
    limit: float | None = None,
    show: Callable[[dict[str, Any]], None] = lambda row: print(json.dumps(row), flush=True),
) -> list[dict[str, Any]]:
    """``work(job)`` of every job in ``processes`` fresh processes; rows in the order in which they end, each shown at once.

    A job that raises gives ``{"job": …, "error": …}``. limit: seconds after which what is not finished is ended and left
    out. work must be importable by name.
    """
    end = None if limit is None else time.monotonic() + limit
    rows: list[dict[str, Any]] = []
    # A GPU's process does small operations on the CPU: more threads only wait for each other.
    threads = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // processes)
    with multiprocessing.get_context("spawn").Pool(processes, _start, (min(threads, 8),)) as pool:
        results = pool.imap_unordered(_Caught(work), jobs)
        for _ in jobs:
            try:
                row = results.next(None if end is None else max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print(json.dumps({"ended_after_seconds": limit, "finished": len(rows), "of": len(jobs)}), flush=True)
                break
            rows.append(row)
            show(row)
    return rows


class _Caught:
    def __init__(self, work: Callable[[Any], dict[str, Any]]):
        self.work = work

    def __call__(self, job: Any) -> dict[str, Any]:
        try:
            return self.work(job)
        except Exception as error:  # one run that fails leaves the others' figures
            traceback.print_exc()
            return {"job": str(job), "error": f"{type(error).__name__}: {error}"[:400]}


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
