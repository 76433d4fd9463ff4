"""Which rows does one shard hold from a place on, and what happens when it is damaged or cannot be reached?"""

from __future__ import annotations

import io
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm.data.shards.members import row_of
from mllm.data.shards.names import LINES, PARQUET, file_system, is_local, is_tar
from mllm.data.shards.tar import groups
from mllm.errors import DataError, MllmError, UnavailableError
from mllm.install import install_hint

_log = logging.getLogger(__name__)
WAITS = (1, 2, 4, 8, 15, 30, 60, 60, 60)
"""Seconds between tries of a store that does not answer: a network that is gone for some minutes ends no run."""
_BLOCK = 8 << 20
_ROWS_AT_ONCE = 64


class Item(NamedTuple):
    """One row of a shard, or why there is none. number: its place in the shard; after: where the next one begins, in bytes (rows of
    parquet)."""

    shard: str
    number: int
    after: int
    key: str
    row: Mapping[str, Any] | None
    problem: str = ""
    kind: str = "cannot be read"


class _DamagedError(Exception):
    """The rest of a shard cannot be read."""


def items(
    shard: str, *, number: int = 0, start: int = 0, columns: Sequence[str] | None = None, where: str = "data"
) -> Iterator[Item]:
    """The rows of a shard from row ``number`` on, which begins at ``start`` (an `Item`'s ``after``).

    What cannot be used is an item without a row: a damaged member, a shard whose rest is damaged, one without rows. columns: of
    parquet, those that are read. A store that does not answer is asked again for about four minutes (`WAITS`), then `DataError`; so
    for a shard that is not there.
    """
    tries, first = 0, number
    while True:
        try:
            for item in _reader(shard)(shard, number, start, columns, where):
                number, start, tries = item.number + 1, item.after, 0
                yield item
            break
        except FileNotFoundError:
            raise DataError(
                f"{where}: {shard} is missing; fetch it, or name the shards that are there in path"
            ) from None
        except _DamagedError as error:
            reason = f"the rest of the shard from row {number} on is damaged and left out ({error})"
            yield Item(shard, number, -1, "", None, reason, "damaged shard")
            return
        except MllmError:
            raise
        except Exception as error:  # every store's client raises its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if is_local(shard) or tries == len(WAITS):
                raise DataError(f"{where}: {shard} cannot be read at row {number} ({reason})") from error
            _log.warning("%s: no answer at row %d (%s); trying again in %d s", shard, number, reason, WAITS[tries])
            time.sleep(WAITS[tries])
            tries += 1
    if number == first == 0:
        yield Item(shard, 0, -1, "", None, "the shard holds no rows", "empty shard")


def parquet_rows(shards: Sequence[str], *, where: str) -> int:
    """How many rows parquet shards hold, from their footers. Raises `DataError` naming one that cannot be read."""
    from concurrent.futures import ThreadPoolExecutor

    def rows(shard: str) -> int:
        try:
            with _opened(shard, where) as file:
                return _parquet(file).metadata.num_rows
        except (OSError, ValueError, _DamagedError) as error:
            raise DataError(f"{where}: {shard}: not readable as parquet ({' '.join(str(error).split())})") from None

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(rows, shards))


def _reader(shard: str) -> Callable[..., Iterator[Item]]:
    return _tar_items if is_tar(shard) else _parquet_items if shard.endswith(PARQUET) else _line_items


def _opened(shard: str, where: str) -> Any:
    """A shard's bytes, decompressed, with `seek`."""
    from fsspec.utils import compressions

    system, inner = file_system(shard, where=where)
    ending = shard.rpartition(".")[2].replace("tgz", "gz")
    compression = compressions.get(ending) if shard.endswith((*LINES, ".tgz")) or ".tar." in shard else None
    options: dict[str, Any] = {} if is_local(shard) else {"block_size": _BLOCK, "cache_type": "readahead"}
    return system.open(inner, "rb", compression=compression, **options)


def _tar_items(shard: str, number: int, start: int, columns: Any, where: str) -> Iterator[Item]:
    with _opened(shard, where) as file:
        try:
            for group in groups(file, start):
                row, problem = None, group.problem
                if not problem:
                    try:
                        row = row_of(group.key, group.members)
                    except DataError as error:
                        problem = str(error)
                kind = "damaged tar member" if group.problem else "cannot be read"
                yield Item(shard, number, group.end, group.key, row, problem, kind)
                number += 1
        except (zlib.error, EOFError) as error:
            raise _DamagedError(str(error)) from error


def _line_items(shard: str, number: int, start: int, columns: Any, where: str) -> Iterator[Item]:
    with _opened(shard, where) as file:
        file.seek(start)
        reader = io.BufferedReader(file, _BLOCK) if isinstance(file, io.RawIOBase) else file
        while True:
            try:
                line = reader.readline()
            except (zlib.error, EOFError) as error:
                raise _DamagedError(str(error)) from error
            if not line:
                return
            start += len(line)
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            row, problem = _json_row(line)
            yield Item(shard, number, start, str(number), row, problem)
            number += 1


def _json_row(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        return None, f"not valid JSON ({error})"
    if not isinstance(row, dict):
        return None, f"expected an object, got {type(row).__name__}"
    return row, ""


def _parquet(file: Any) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnavailableError(f"parquet shards need pyarrow; {install_hint('train')}") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise _DamagedError(str(error)) from error


def _parquet_items(shard: str, number: int, start: int, columns: Sequence[str] | None, where: str) -> Iterator[Item]:
    with _opened(shard, where) as file:
        table = _parquet(file)
        import pyarrow

        known = table.schema_arrow.names
        wanted = None if columns is None else [name for name in columns if name in known]
        before = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if before + rows <= number:
                before += rows
                continue
            try:
                place = before
                for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                    if place + len(batch) > number:
                        for row in batch.slice(number - place).to_pylist():
                            yield Item(shard, number, number + 1, str(number), row)
                            number += 1
                    place += len(batch)
            except pyarrow.ArrowInvalid as error:
                raise _DamagedError(str(error)) from error
            before += rows
