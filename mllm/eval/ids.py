"""Which ids are there, and where does what they name stand, in a few bytes each?"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm.eval.spool import KEPT, Names

_KEY = 16
_FULLEST = 0.8
_PLACE_BITS = 48


class Ids:
    """A set of ids. The first `KEPT` are a set of texts; of more, sixteen bytes of a hash stand for each (two of a million are taken for
    one with a probability of 1e-27) in a table that is between half and four fifths full: 20 to 32 bytes an id, where a set of short
    texts takes 110."""

    def __init__(self, ids: Iterable[str] = (), *, kept: int = KEPT):
        self._kept, self._few, self._count = kept, set[str](), 0
        self._table: bytearray | None = None
        for name in ids:
            self.add(name)

    def add(self, name: str) -> bool:
        """Put one in. Whether it was not there yet."""
        if self._table is None:
            self._few.add(name)
            new = len(self._few) > self._count
            self._count = len(self._few)
            if self._count > self._kept:
                self._grow(map(_key, self._few))
                self._few = set()
            return new
        key = _key(name)
        spot = self._spot(self._table, key)
        if self._table[spot : spot + _KEY] == key:
            return False
        self._table[spot : spot + _KEY] = key
        self._count += 1
        if self._count > _FULLEST * len(self._table) / _KEY:
            table = self._table
            self._grow(key for k in range(0, len(table), _KEY) if any(key := bytes(table[k : k + _KEY])))
        return True

    def __contains__(self, name: object) -> bool:
        if self._table is None:
            return name in self._few
        key = _key(str(name))
        spot = self._spot(self._table, key)
        return self._table[spot : spot + _KEY] == key

    def __len__(self) -> int:
        return self._count

    def _grow(self, keys: Iterable[bytes]) -> None:
        table = bytearray(_KEY * (2 * self._count))
        for key in keys:
            spot = self._spot(table, key)
            table[spot : spot + _KEY] = key
        self._table = table

    @staticmethod
    def _spot(table: bytearray, key: bytes) -> int:
        """Where a key stands, or the free place where it would."""
        spot = int.from_bytes(key[:8], "little") % (len(table) // _KEY) * _KEY
        while (there := table[spot : spot + _KEY]) != _FREE and there != key:
            spot = (spot + _KEY) % len(table)
        return spot


_FREE = bytes(_KEY)


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_KEY).digest()


class Places:
    """Numbers by name, 16 bytes each. Two names may meet in one hash: whoever asks compares what stands there."""

    def __init__(self) -> None:
        self._hashes, self._numbers = array("q"), array("Q")
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, name: str, number: int) -> None:
        """One more. Raises no error for a name that is there: `of` gives both, in their order."""
        self._hashes.append(hash(name))
        self._numbers.append(number)
        self._sorted = None

    def of(self, name: str) -> Iterator[int]:
        """The numbers that may be meant, first those that were put in first."""
        hashes, numbers = self._settled()
        spot, wanted = int(np.searchsorted(hashes, hash(name))), hash(name)
        while spot < len(hashes) and hashes[spot] == wanted:
            yield int(numbers[spot])
            spot += 1

    def met(self) -> Iterator[list[int]]:
        """Numbers whose names have one hash, for every hash that several names have."""
        hashes, numbers = self._settled()
        same = np.flatnonzero(hashes[1:] == hashes[:-1])
        for first in same[np.diff(same, prepend=-2) > 1].tolist():
            last = first + 1
            while last < len(hashes) and hashes[last] == hashes[first]:
                last += 1
            yield numbers[first:last].tolist()

    def __len__(self) -> int:
        return len(self._numbers)

    def _settled(self) -> tuple[np.ndarray, np.ndarray]:
        if self._sorted is None:
            hashes = np.frombuffer(self._hashes, dtype=np.int64) if self._hashes else np.zeros(0, np.int64)
            order = np.argsort(hashes, kind="stable")
            numbers = np.frombuffer(self._numbers, dtype=np.uint64) if self._numbers else np.zeros(0, np.uint64)
            self._sorted = hashes[order], numbers[order]
        return self._sorted


class ByName(Mapping[str, float]):
    """Numbers by name, some 40 bytes each. The first of a name that comes twice stands."""

    def __init__(self, pairs: Iterable[tuple[str, float]] = ()):
        self._names, self._values, self._places = Names(), array("d"), Places()
        for name, value in pairs:
            self._places.add(name, len(self._values))
            self._names.append(name)
            self._values.append(value)

    def __getitem__(self, name: str) -> float:
        for place in self._places.of(name):
            if self._names[place] == name:
                return self._values[place]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._values)


class RowIndex:
    """The rows of prediction files by their ids, read when asked for."""

    def __init__(self) -> None:
        self._places, self._paths, self._files = Places(), list[Path](), list[Any]()

    def add(self, path: Path, places: Iterable[tuple[str, int]]) -> None:
        """One more file. places: (id, where its line begins)."""
        number = len(self._paths) << _PLACE_BITS
        self._paths.append(path)
        self._files.append(path.open("rb"))
        for name, place in places:
            self._places.add(name, number | place)

    def line(self, name: str) -> bytes | None:
        """The line of an id in the first file that has it."""
        start = b'{"id": ' + json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass") + b","
        for place in self._places.of(name):
            line = self._at(place)
            if line.startswith(start) or json.loads(line)["id"] == name:
                return line
        return None

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of an id in the first file that has it."""
        line = self.line(name)
        return None if line is None else json.loads(line)

    def doubled(self) -> tuple[str, Path] | None:
        """(an id that stands in two places, the file of the second), or None."""
        for places in self._places.met():
            seen = set()
            for place in places:
                name = json.loads(self._at(place))["id"]
                if name in seen:
                    return name, self._paths[place >> _PLACE_BITS]
                seen.add(name)
        return None

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, place: int) -> bytes:
        file = self._files[place >> _PLACE_BITS]
        file.seek(place & ((1 << _PLACE_BITS) - 1))
        return file.readline()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
