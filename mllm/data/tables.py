"""How is a table opened, in training and in evaluation: files of any kind, a saved data set, one of the hub?

Text (json, jsonl, csv, tsv) is read row by row, as it is written (`mllm.data.files`): a library that guesses types makes 7 of
``007``, nothing of the answer ``None`` and a point in time of ``2014-01-01``. Parquet, arrow and the hub go through `datasets`,
which maps them into memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mllm.data.files import Files, JsonRows, TextRows
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.hub import hub_reason
from mllm.install import install_hint

TEXT = (".jsonl", ".json", ".csv", ".tsv")
BINARY = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (*BINARY, *TEXT)
_QUIET_BYTES = 100 << 20
"""Smaller files are ready before anybody asks how far their reading is."""
_MEDIA = ("Image", "Video", "Audio")


def open_files(paths: Sequence[Path], *, where: str, streaming: bool = False) -> Any:
    """Rows of files of one kind, in their order: `Files` for text, else a table of `datasets` (with ``streaming`` an iterable
    one). Raises `ConfigError` for files of several kinds or of none that is known, `DataError` for damaged ones."""
    suffixes = {path.suffix.lower() for path in paths}
    if len({".json" if suffix == ".jsonl" else suffix for suffix in suffixes}) > 1 or not suffixes <= set(SUFFIXES):
        raise ConfigError(
            f"{where}: found {', '.join(sorted(suffixes))}; expected files of one of {', '.join(SUFFIXES)}"
        )
    suffix = suffixes.pop()
    if suffix in TEXT:
        return Files(paths)
    quiet = sum(path.stat().st_size for path in paths) < _QUIET_BYTES
    named = [str(path) for path in paths]
    try:
        with _without_bars() if quiet else contextlib.nullcontext():
            return datasets_package().load_dataset(BINARY[suffix], data_files=named, split="train", streaming=streaming)
    except UnavailableError:
        raise
    except Exception as error:  # readers of foreign files raise whatever they like
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{where}: {named[0]}: not readable as {BINARY[suffix]} ({reason})") from error


def open_hub(
    name: str, subset: str | None, *, split: str, revision: str | None, where: str, streaming: bool = False
) -> Any:
    """A table of the hub. Raises `DataError` with the reason when it does not load, `UnavailableError` without `datasets`."""
    try:
        return datasets_package().load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    except UnavailableError:
        raise
    except Exception as error:  # hub clients raise many kinds
        pinned = f" (revision {revision})" if revision else ""
        raise DataError(f"{where}: {name}{pinned} could not be loaded ({hub_reason(error, name)})") from error


def is_saved(path: Path) -> bool:
    """Whether a folder is what `datasets` wrote with ``save_to_disk``."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def open_saved(path: Path, split: str, *, where: str, streaming: bool = False) -> Any:
    """A table that was saved with ``save_to_disk``. Raises `ConfigError` when it has no such split."""
    datasets = datasets_package()
    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ConfigError(f"{where}: {path} has no split {split!r}; it has {', '.join(map(str, table))}")
        table = table[split]
    return table.to_iterable_dataset() if streaming else table


def datasets_package() -> Any:
    """`datasets`. Raises `UnavailableError` saying what to install."""
    try:
        import datasets
    except ImportError:
        raise UnavailableError(
            f"parquet, arrow and hub tables need the datasets package: {install_hint('train')}"
        ) from None
    return datasets


def undecoded(table: Any) -> Any:
    """A table of `datasets` with its media left as stored, ``{"bytes", "path"}``: they are decoded once, where their errors are
    named, and not at all for samples that are only counted."""
    datasets = datasets_package()
    media = tuple(getattr(datasets, name) for name in _MEDIA if hasattr(datasets, name))
    for name, feature in (table.features or {}).items():
        if isinstance(feature, media):
            table = table.cast_column(name, replace(feature, decode=False))  # type: ignore[type-var]
        elif isinstance(getattr(feature, "feature", None), media):
            table = table.cast_column(name, type(feature)(replace(feature.feature, decode=False)))
        elif isinstance(feature, list) and feature and isinstance(feature[0], media):
            table = table.cast_column(name, [replace(feature[0], decode=False)])  # type: ignore[type-var]
    return table


def keys_of(rows: Files, needed: Sequence[str], *, first: int = 1000) -> list[str]:
    """Columns of text files: those of the first rows, and of all rows where a needed one is not among them (JSON's rows may
    lack what they do not hold)."""
    known: dict[str, None] = {}
    numbers = iter(range(len(rows)))
    for number in islice(numbers, first):
        known.update(dict.fromkeys(rows[number]))
    for number in numbers:
        if all(name in known for name in needed):
            break
        known.update(dict.fromkeys(rows[number]))
    return list(known)


def json_entries(path: Path, records: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(key or number, row) of a JSON file: of the list or mapping that it is, or that lies under ``records`` (keys joined by
    dots). Raises `DataError` naming the file."""
    if records is None and isinstance(rows := _plain_rows(path), TextRows):
        yield from enumerate(rows)
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    for key in records.split(".") if records else []:
        if not isinstance(data, dict) or key not in data:
            raise DataError(
                f"{path}: no {records!r} in it; keys: {', '.join(map(str, data)) if isinstance(data, dict) else '-'}"
            )
        data = data[key]
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if entries is None:
        raise DataError(f"{path}: expected a list or mapping of rows{f' under {records!r}' if records else ''}")
    for key, row in entries:
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {key!r} is {type(row).__name__}, expected a mapping of fields")
        yield key, row


def _plain_rows(path: Path) -> TextRows | None:
    """The rows of a file that is one list, as training reads it; None for one that is a mapping."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None
    return JsonRows(path)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    datasets = datasets_package()
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
