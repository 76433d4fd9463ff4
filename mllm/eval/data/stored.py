"""How are a table's rows read without holding its pictures in memory?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mllm.errors import DataError
from mllm.eval.data.pictures import Picture

_AT_ONCE = 1000
"""Rows whose plain cells are taken from the table together."""


def stored_rows(table: Any, label: str, folder: Path = Path()) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets` table (`mllm.data.tables`) as plain values; ``{bytes, path}`` columns (pictures as hub datasets store
    them) and lists of them become `Picture` objects that read their bytes when asked. A null picture is None. label: what to
    call the table; folder: where relative paths start."""
    arrow = table.data
    single = [field.name for field in arrow.schema if _is_image(field.type)]
    several = [field.name for field in arrow.schema if _is_list(field.type) and _is_image(field.type.value_type)]
    counts = {name: _counts(arrow.column(name), name in several) for name in (*single, *several)}
    plain = table.remove_columns(list(counts)).with_format("arrow")

    files = tuple(str(file["filename"]) for file in table.cache_files)
    place = files if files and _mapped(files).num_rows == len(table) else arrow

    def picture(name: str, number: int, position: int | None = None) -> Picture:
        return Picture(partial(_read_cell, place, name, number, position, folder), f"{label} row {number} {name}")

    batches = plain.iter(_AT_ONCE) if plain.column_names else ()
    cells = (row for batch in batches for row in batch.to_pylist())
    for number in range(len(table)):
        row = next(cells, {})
        for name in single:
            row[name] = picture(name, number) if counts[name][number] else None
        for name in several:
            row[name] = [picture(name, number, k) for k in range(counts[name][number])]
        yield row


def _is_image(kind: Any) -> bool:
    return getattr(kind, "num_fields", 0) == 2 and {field.name for field in kind} == {"bytes", "path"}


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(("list<", "large_list<"))


def _counts(column: Any, several: bool) -> list[int]:
    """Pictures per row, told by the table's index of them: none is read."""
    if not several:
        return [int(valid) for valid in column.is_valid().to_pylist()]
    import pyarrow.compute as pc

    return [int(length or 0) for length in pc.call_function("list_value_length", [column]).to_pylist()]


def _read_cell(place: Any, name: str, number: int, position: int | None, folder: Path) -> bytes:
    """A picture's bytes. place: the table, or the files that hold it: a question waits on disk with their names alone."""
    cell = (_mapped(place) if isinstance(place, tuple) else place).column(name)[number].as_py()
    cell = cell[position] if position is not None else cell
    if not cell or not (cell["bytes"] or cell["path"]):
        raise DataError(f"{name} of row {number} is empty")
    return cell["bytes"] or (folder / cell["path"]).read_bytes()


@lru_cache(maxsize=64)
def _mapped(files: tuple[str, ...]) -> Any:
    """The table in files as `datasets` keeps them, mapped into memory."""
    import pyarrow as pa

    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files)
