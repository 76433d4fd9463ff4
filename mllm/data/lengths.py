"""How many tokens does every sample of a dataset have?"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mllm.data.parallel import chunks, pool_context
from mllm.data.sources import Source
from mllm.errors import AlignmentError, DataError
from mllm.types import Sample


def measure(
    source: Source,
    length: Callable[[Sample], int],
    *,
    rows: int | None = None,
    key: str = "",
    cache: Path | str | None = None,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Tokens of every row (of the first ``rows``), int32; 0 where the row or ``length`` raises (it will be dropped and
    named when its turn comes).

    Visual tokens are counted without opening images. key: what ``length`` depends on (tokenizer, template, visual
    tokens); with it and ``cache``, a folder, the table is stored and read back as long as the dataset's fingerprint is
    the same.
    """
    stored, total = None, min(len(source), rows or len(source))
    if cache is not None and key:
        digest = hashlib.sha256(f"{source.fingerprint}\n{key}\n{total}".encode()).hexdigest()[:24]
        stored = Path(cache) / f"{source.name}-{digest}.npy"
        if stored.is_file():
            table = np.load(stored)
            if len(table) == total:
                return table
    parts = chunks(total, 512)
    work = partial(_measure_rows, source, length)
    tables = []
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=pool_context()) as pool:
            for part in pool.map(work, parts):
                tables.append(part)
                if progress:
                    progress(len(part))
    else:
        for part in map(work, parts):
            tables.append(part)
            if progress:
                progress(len(part))
    table = np.concatenate(tables) if tables else np.zeros(0, np.int32)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=stored.parent, suffix=".tmp", delete=False) as file:
            np.save(file, table)
        Path(file.name).replace(stored)
    return table


def _measure_rows(source: Source, length: Callable[[Sample], int], rows: range) -> np.ndarray:
    table = np.zeros(len(rows), np.int32)
    for place, row in enumerate(rows):
        try:
            table[place] = length(source[row])
        except (DataError, AlignmentError):
            table[place] = 0
    return table
