"""Is one table a copy, a part or an extension of another, so that a split by source would still leak?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE = 192
_ENOUGH = 8
"""Telling values that two columns must share before they are called one."""
_SHARE = 0.5


@dataclass(frozen=True)
class Fingerprint:
    """What a table's columns of numbers hold. sketches: per column the smallest hashes of its telling values (not codes, counts
    or years, which unrelated tables share); sequences: hashes of whole columns, for those made of small whole numbers."""

    sketches: tuple[tuple[int, ...], ...]
    sequences: frozenset[int]


def fingerprint(frame: Any, columns: Iterable[str]) -> Fingerprint:
    """The fingerprint of a table's columns of numbers."""
    sketches, sequences = [], set()
    for column in columns:
        values = np.asarray(frame[column].dropna(), float)
        values = values[np.isfinite(values)]
        if len(values) >= 2 * _ENOUGH and len(np.unique(values)) >= 4 and not _sorted(values):
            sequences.add(int(_mix(_hashes(values))))
        telling = np.unique(_hashes(values[_tells(values)]))
        if len(telling) >= _ENOUGH:
            sketches.append(tuple(int(h) for h in telling[:SIZE]))
    return Fingerprint(tuple(sketches), frozenset(sequences))


def _tells(values: np.ndarray) -> np.ndarray:
    """Four or more significant digits, and no year: fewer, and unrelated columns meet by chance."""
    size = np.power(10.0, np.floor(np.log10(np.where(values == 0, 1, np.abs(values)))))
    long = np.abs(values / size * 100 - np.round(values / size * 100)) > 1e-6
    return long & ((np.abs(values) >= 2200) | (values != np.round(values)))


def _sorted(values: np.ndarray) -> bool:
    """Row numbers, years and codes in blocks: equal in tables that have nothing else in common."""
    return bool((np.diff(values) >= 0).all() or (np.diff(values) <= 0).all())


def _hashes(values: np.ndarray) -> np.ndarray:
    """One 64-bit hash per value, equal for values that agree in six significant digits."""
    size = np.power(10.0, np.floor(np.log10(np.where(values == 0, 1, np.abs(values)))))
    bits = (np.round(values / size, 5) + 0.0).view(np.uint64) ^ size.view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return (bits ^ (bits >> np.uint64(29))) >> np.uint64(1)


def _mix(hashes: np.ndarray) -> np.uint64:
    """Order-dependent hash of a column."""
    powers = np.cumprod(np.full(len(hashes), 0x9E3779B97F4A7C15, np.uint64))
    return np.bitwise_xor.reduce(hashes * powers)


class Known:
    """Tables that may not come again: `match` says which of them a table repeats."""

    def __init__(self, tables: dict[str, Fingerprint]):
        self._holders: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self._sequences: dict[int, str] = {}
        self._ends: dict[tuple[str, int], tuple[int, int]] = {}
        for name, print_ in tables.items():
            for place, sketch in enumerate(print_.sketches):
                self._ends[name, place] = (sketch[-1] if len(sketch) == SIZE else 2**63, len(sketch))
                for value in sketch:
                    self._holders[value].append((name, place))
            for sequence in print_.sequences:
                self._sequences.setdefault(sequence, name)

    def match(self, table: Fingerprint) -> str | None:
        """The table with a column that shares at least half of its telling values with one of this table's (the shorter one
        counts, so that parts are found), or that equals one whole; None where there is none."""
        for sequence in table.sequences:
            if sequence in self._sequences:
                return self._sequences[sequence]
        for sketch in table.sketches:
            shared = Counter(holder for value in sketch for holder in self._holders.get(value, ()))
            end = sketch[-1] if len(sketch) == SIZE else 2**63
            for holder, count in shared.most_common(5):
                other_end, other_size = self._ends[holder]
                mine = sum(value <= other_end for value in sketch)
                theirs = other_size if end >= other_end else other_size * end / max(other_end, 1)
                if count >= _ENOUGH and count >= _SHARE * min(mine, theirs):
                    return holder[0]
        return None
