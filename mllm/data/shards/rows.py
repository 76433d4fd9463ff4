"""What does a source know of its shards before and while they are read?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from mllm.data.shards.names import PARQUET, find_shards, is_tar
from mllm.data.shards.read import Item, items, parquet_rows
from mllm.errors import ConfigError, DataError


class ShardRows:
    """The rows of all shards of a dataset. Nothing is counted beforehand but parquet's footers; ``shards[k]`` reads from the first
    shard to the k-th row (checks look at the first few), and training reads each shard by itself (`mllm.data.shards.lanes`).

    Args:
        pattern: As `mllm.data.shards.names.find_shards` takes it.
        rows: How many there are; parquet's footers tell.
        name: The dataset's, for errors.
    """

    def __init__(self, pattern: str, *, rows: int | None, name: str):
        self.name, self.where = name, f"dataset {name}"
        self.sizes = find_shards(pattern, where=self.where)
        self.shards = list(self.sizes)
        self.columns: Sequence[str] | None = None
        """Of parquet, those that are read; None: all."""
        if rows is None and self.shards[0].endswith(PARQUET):
            rows = parquet_rows(self.shards, where=self.where)
            if not rows:
                raise DataError(f"{self.where}: {pattern} holds no rows")
        if rows is None:
            raise ConfigError(
                f"{self.where}: rows is missing: shards of tar and jsonl do not say how many rows they hold, and an epoch must have a "
                "length; write rows: (about how many there are will do)"
            )
        self.rows = rows
        self._reading: Iterator[Item] | None = None
        self._next = 0
        self._end: int | None = None
        """How many there are, once that is known."""

    def __len__(self) -> int:
        return self.rows

    @property
    def of_members(self) -> bool:
        """Whether rows are groups of a tar file's members."""
        return is_tar(self.shards[0])

    @property
    def fingerprint(self) -> str:
        """Changes with the shards' names, their sizes, and the length of an epoch."""
        return hashlib.sha256(json.dumps([list(self.sizes.items()), self.rows]).encode()).hexdigest()

    def __getitem__(self, index: int) -> Item:
        """The ``index``-th row, or why it is none. Raises `DataError` when there are fewer."""
        if self._end is not None and index >= self._end:
            raise DataError(
                f"{self.where}: the {len(self.shards)} shards hold {self._end} rows, and rows says {self.rows}; correct it"
            )
        if self._reading is None or index < self._next:
            self._reading, self._next = self._all(), 0
        for item in self._reading:
            self._next += 1
            if self._next > index:
                return item
        self._end, self._reading = self._next, None
        return self[index]

    def first_row(self) -> Mapping[str, Any]:
        """The first row that can be read. Raises `DataError` when the first hundred cannot."""
        problem = "they are empty"
        for item in islice(self._all(), 100):
            if item.row is not None:
                return item.row
            problem = f"{item.shard}, row {item.number}: {item.problem}"
        raise DataError(f"{self.where}: no row of the {len(self.shards)} shards can be read ({problem})")

    def _all(self) -> Iterator[Item]:
        for shard in self.shards:
            yield from self.read(shard)

    def read(self, shard: str, number: int = 0, start: int = 0) -> Iterator[Item]:
        """`mllm.data.shards.read.items` of one of them."""
        return items(shard, number=number, start=start, columns=self.columns, where=self.where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None, "_next": 0}
