"""How are a million questions or answers walked through again and again without being in memory?"""

from __future__ import annotations

import os
import pickle
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")
KEPT = 20_000
"""So many stay in memory; more go to disk."""
_AT_ONCE = 512
_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


class Indexed(Sequence[T]):
    """Things by their place: `_at` gives one, and slices are lists."""

    @abstractmethod
    def _at(self, place: int) -> T:
        """The thing at a place from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]


class Spool(Indexed[T]):
    """Things in order, of which the first `KEPT` are a list and more than that lie in a file without a name in the folder for
    temporary files (``$TMPDIR``): 8 bytes a thing stay in memory. What cannot be pickled (a picture that is a function of an open
    table) stays a list. Threads and forked processes may read it together."""

    def __init__(self, things: Iterable[T] = (), *, kept: int = KEPT):
        self._kept, self._list, self._ends = kept, list[T](), array("Q", [0])
        self._file: Any = None
        for thing in things:
            self.append(thing)

    def append(self, thing: T) -> None:
        """Put one more at the end."""
        if self._file is None:
            self._list.append(thing)
            if len(self._list) > self._kept:
                self._spill()
            return
        try:
            self._write(thing)
        except _UNPICKLABLE:
            self._stay([*self, thing])

    def _spill(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this is)
        try:
            for thing in self._list:
                self._write(thing)
        except _UNPICKLABLE:
            self._stay(self._list)
        else:
            self._list = []

    def _stay(self, things: list[T]) -> None:
        """Be a list from now on."""
        self._file.close()
        self._list, self._file, self._ends, self._kept = things, None, array("Q", [0]), 1 << 62

    def _write(self, thing: T) -> None:
        data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def _read(self, first: int, last: int) -> bytes:
        self._file.flush()
        begin, end = self._ends[first], self._ends[last]
        parts: list[bytes] = []
        while begin < end:
            parts.append(os.pread(self._file.fileno(), end - begin, begin))  # at most 2 GiB come at once
            begin += len(parts[-1])
        return b"".join(parts)

    def __len__(self) -> int:
        return len(self._list) if self._file is None else len(self._ends) - 1

    def _at(self, place: int) -> T:
        return self._list[place] if self._file is None else pickle.loads(self._read(place, place + 1))

    def __iter__(self) -> Iterator[T]:
        if self._file is None:
            yield from self._list
            return
        for first in range(0, len(self), _AT_ONCE):
            last = min(first + _AT_ONCE, len(self))
            data, begin = memoryview(self._read(first, last)), self._ends[first]
            for k in range(first, last):
                yield pickle.loads(data[self._ends[k] - begin : self._ends[k + 1] - begin])

    def settled(self) -> Sequence[T]:
        """The list itself where everything is in memory, else this."""
        return self._list if self._file is None else self


class Names(Indexed[str]):
    """Ids in order as one run of bytes: a million short ones are some 15 MB, as a list of texts 60."""

    def __init__(self, names: Iterable[str] = ()):
        self._bytes, self._ends = bytearray(), array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Put one more at the end."""
        self._bytes += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _at(self, place: int) -> str:
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogatepass")
