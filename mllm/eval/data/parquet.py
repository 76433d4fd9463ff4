"""How are rows of a parquet file read without holding its pictures in memory?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm.errors import DataError
from mllm.eval.data.pictures import Picture


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file as plain values; ``{bytes, path}`` columns (pictures as hub datasets store them) and lists of
    them become `Picture` objects that read their bytes when asked. A null picture is None. Raises `DataError` for a
    broken file."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as parquet ({error})") from None
    single = [field.name for field in file.schema_arrow if _is_image(field.type)]
    several = [
        field.name for field in file.schema_arrow if pa.types.is_list(field.type) and _is_image(field.type.value_type)
    ]
    plain = [field.name for field in file.schema_arrow if field.name not in {*single, *several}]
    number = 0
    for group in range(file.num_row_groups):
        rows = (
            file.read_row_group(group, columns=plain).to_pylist()
            if plain
            else [{}] * file.metadata.row_group(group).num_rows
        )
        counts = _picture_counts(file, group, single, several)
        for offset, row in enumerate(rows):
            for name in single:
                present = counts[name][offset] > 0
                row[name] = _picture(path, group, offset, name, None, number) if present else None
            for name in several:
                row[name] = [_picture(path, group, offset, name, k, number) for k in range(counts[name][offset])]
            number += 1
            yield row


def _picture_counts(file: pq.ParquetFile, group: int, single: list[str], several: list[str]) -> dict[str, list[int]]:
    """Pictures per row of each picture column. Of a single picture only the ``path`` leaf is read: it tells null
    rows."""
    counts: dict[str, list[int]] = {}
    for name in single:
        column = file.read_row_group(group, columns=[f"{name}.path"]).column(0)
        counts[name] = [int(valid) for valid in column.is_valid().to_pylist()]
    for name in several:
        column = file.read_row_group(group, columns=[name]).column(0)
        counts[name] = [len(cells) if cells.is_valid else 0 for cells in column]
    return counts


def _picture(path: Path, group: int, offset: int, name: str, position: int | None, number: int) -> Picture:
    return Picture(partial(_read_cell, path, group, offset, name, position), f"{path.name} row {number} {name}")


def _read_cell(path: Path, group: int, offset: int, name: str, position: int | None) -> bytes:
    cell = _column(str(path), group, name)[offset].as_py()
    cell = cell[position] if position is not None else cell
    if not cell["bytes"] and not cell["path"]:
        raise DataError(f"{path}: {name} of a row is empty")
    return cell["bytes"] or (path.parent / cell["path"]).read_bytes()


@lru_cache(maxsize=8)
def _column(path: str, group: int, name: str) -> Any:
    return pq.ParquetFile(path).read_row_group(group, columns=[name]).column(0)
