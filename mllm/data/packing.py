"""Which samples share a row?"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Rows of sample indices, each at most ``max_length`` tokens together: best-fit decreasing.

    Samples stay whole, so an image span is never cut. Length 0 means a sample to leave out. Every other index is in
    exactly one row. Deterministic: ties go to the earlier sample and the earlier row. Raises ValueError for a length
    above ``max_length``.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and int(sizes.max()) > max_length:
        raise ValueError(
            f"sample {int(sizes.argmax())} has {int(sizes.max())} tokens, more than max_length={max_length}"
        )
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted: the first with enough room is the best fit
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        if size == 0:
            continue
        place = bisect.bisect_left(open_rows, (size, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = max_length, len(rows)
            rows.append([index])
        if room - size > 0:
            bisect.insort(open_rows, (room - size, row))
    return rows


def split_to_multiple(rows: list[list[int]], multiple: int) -> list[list[int]]:
    """The same samples in a number of rows that ``multiple`` divides: the fullest-numbered rows give up their shortest
    sample.

    When every row holds a single sample and the number still does not fit, it is returned as it is.
    """
    rows = [list(row) for row in rows]
    while len(rows) % multiple:
        donor = max(range(len(rows)), key=lambda r: (len(rows[r]), -r))
        if len(rows[donor]) < 2:
            break
        rows.append([rows[donor].pop()])
    return rows


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, max_length: int) -> float:
    """Share of the rows' tokens that are not padding."""
    used = sum(int(lengths[index]) for row in rows for index in row)
    return used / (len(rows) * max_length) if rows else 0.0
