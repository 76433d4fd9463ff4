"""Which places stand for a whole row of them?"""

from __future__ import annotations


def spread(available: int, count: int) -> list[int]:
    """``count`` numbers from 0 to the last, as ``numpy.linspace(0, available - 1, count, dtype=int)`` gives them."""
    if count == 1:
        return [0]
    step = (available - 1) / (count - 1)
    return [*(int(k * step) for k in range(count - 1)), available - 1]


def middles(available: int, count: int) -> list[int]:
    """The middle of each of ``count`` equal parts, as PVC's and InternVL's ``get_index`` rounds it."""
    segment = (available - 1) / count
    return [min(available - 1, int(segment / 2 + round(segment * k))) for k in range(count)]
