"""How many tokens does every sample of a dataset have?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mllm.data.parallel import chunks, spread
from mllm.data.sources import Source
from mllm.errors import AlignmentError, DataError, blamed_on
from mllm.modes import whole_file
from mllm.types import Sample

ROWS_A_PROCESS = 250
"""From a quarter of a second (1 ms a row) to one and a half on a slow core: less is not worth a process."""


def counting_processes(rows: int) -> int:
    """Processes worth starting to count the tokens of so many rows: at most one for each core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, rows // ROWS_A_PROCESS))


def measure(
    source: Source,
    length: Callable[[Sample], int],
    *,
    rows: int | None = None,
    key: str = "",
    cache: Path | str | None = None,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
    on_bad: Callable[[int, str], None] | None = None,
) -> np.ndarray:
    """Tokens of every row (of the first ``rows``), int32; 0 where the row or ``length`` raises.

    Visual tokens are counted without opening images. key: what ``length`` depends on (tokenizer, template, visual
    tokens); with it and ``cache``, a folder, the table is stored and read back as long as the dataset's rows and the way
    they are read are the same. on_bad: told number and reason of every row that has no length; rows that a stored table
    has none for are then tried again.
    """
    stored, total, table = None, min(len(source), rows or len(source)), None
    if cache is not None and key:
        content = f"{source.fingerprint}\n{source.reading}\n{key}\n{total}"
        stored = Path(cache) / f"{source.name}-{hashlib.sha256(content.encode()).hexdigest()[:24]}.npy"
        if stored.is_file():
            table = np.load(stored)
    if table is None or len(table) != total:
        table = _measure_all(source, length, total, processes, progress)
        _store(table, stored)
    if on_bad is not None and (bad := np.flatnonzero(table == 0)).size:
        for row in bad.tolist():
            table[row] = _length(source, length, row, on_bad)
        _store(table, stored)
    return table


def _measure_all(
    source: Source,
    length: Callable[[Sample], int],
    total: int,
    processes: int,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    parts = chunks(total, 512)
    work = partial(_measure_rows, source, length)
    tables = []
    for part in spread(work, parts, processes):
        tables.append(part)
        if progress:
            progress(len(part))
    return np.concatenate(tables) if tables else np.zeros(0, np.int32)


def _store(table: np.ndarray, stored: Path | None) -> None:
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(stored) as file:
            np.save(file, table)


def _measure_rows(source: Source, length: Callable[[Sample], int], rows: range) -> np.ndarray:
    return np.array([_length(source, length, row) for row in rows], np.int32)


def _length(
    source: Source, length: Callable[[Sample], int], row: int, on_bad: Callable[[int, str], None] | None = None
) -> int:
    try:
        sample = source[row]
        with blamed_on(source.where(row, sample.id)):
            return length(sample)
    except (DataError, AlignmentError) as error:
        if on_bad is not None:
            on_bad(row, str(error))
        return 0
