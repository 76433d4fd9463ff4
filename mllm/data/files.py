"""How is row k of a large json, jsonl, csv or tsv file read without holding the file in memory, in training and in evaluation?"""

from __future__ import annotations

import bisect
import codecs
import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mllm.data.shards.names import refuse_gaps
from mllm.errors import DataError

_CHUNK = 1 << 22
_BESIDE = (".quarantine.jsonl", ".routing.jsonl")
"""How files of ours are called that lie beside data and are none."""


class TextRows(Sequence):
    """Rows of one text file by number. Only byte offsets are kept (16 bytes per row); a row is read with one positioned read,
    which is safe in forked workers."""

    starts: np.ndarray
    ends: np.ndarray
    empty_is_missing: ClassVar[bool] = False
    """Whether the format writes what is not there as an empty text."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"{type(self).__name__} takes one row number")
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: row {index} of {len(self)}")
        start, end = int(self.starts[index]), int(self.ends[index])
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._parsed(os.pread(self._descriptor, end - start, start), int(index))

    def _parsed(self, raw: bytes, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class JsonRows(TextRows):
    """Rows of a ``.jsonl`` file or of a ``.json`` file that holds one list of objects. Raises `DataError` naming file and line or
    byte."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        try:
            with self.path.open("rb") as file:
                head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.is_list = head.startswith(b"[")
        self.starts, self.ends = self._index_list() if self.is_list else self._index_lines()

    def _parsed(self, raw: bytes, index: int) -> dict[str, Any]:
        try:
            row = json.loads(raw)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}, row {index}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.path}, row {index}: expected an object, got {type(row).__name__}")
        return row

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file."""
        return file_hash([self.path])

    def _index_lines(self) -> tuple[np.ndarray, np.ndarray]:
        breaks: list[np.ndarray] = []
        position = 0
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position)
                position += len(chunk)
        ends = np.concatenate([*breaks, np.array([position])]).astype(np.int64, copy=False)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
        keep = ends > starts
        short = np.flatnonzero(keep & (ends - starts <= 8))  # a line of blanks is not a row
        if len(short):
            with self.path.open("rb") as file:
                for line in short:
                    file.seek(int(starts[line]))
                    if not file.read(int(ends[line] - starts[line])).strip(b" \t\r\xef\xbb\xbf"):
                        keep[line] = False
        return starts[keep], ends[keep]

    def _index_list(self) -> tuple[np.ndarray, np.ndarray]:
        """Byte range of every object of a top-level list, found with json's own scanner chunk by chunk."""
        scan = json.JSONDecoder().raw_decode
        decode = codecs.getincrementaldecoder("utf-8-sig")()
        starts: list[int] = []
        ends: list[int] = []
        with self.path.open("rb") as file:
            bom = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(0)
            text, offset, opened, at_end = "", bom, False, False
            cursor = 0
            while True:
                while cursor < len(text) and text[cursor] in " \t\r\n,":
                    offset, cursor = offset + 1, cursor + 1
                if cursor < len(text) and not opened:
                    opened, offset, cursor = True, offset + 1, cursor + 1  # the [
                    continue
                if cursor < len(text) and text[cursor] == "]":
                    return np.array(starts, np.int64), np.array(ends, np.int64)
                failure = None
                if cursor < len(text):
                    try:
                        _, stop = scan(text, cursor)
                        piece = text[cursor:stop]
                        length = len(piece) if piece.isascii() else len(piece.encode())
                        starts.append(offset)
                        ends.append(offset + length)
                        offset, cursor = offset + length, stop
                        continue
                    except json.JSONDecodeError as error:
                        failure = error
                if at_end:
                    problem = (
                        f"({failure.msg})" if failure is not None else "(the list is not closed: is the file cut off?)"
                    )
                    raise DataError(f"{self.path}, byte {offset}, row {len(starts)}: not valid JSON {problem}")
                chunk = file.read(max(_CHUNK, len(text) - cursor))
                at_end = not chunk
                try:
                    text, cursor = text[cursor:] + decode.decode(chunk, final=at_end), 0
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path}: not UTF-8 after byte {offset} ({error.reason})") from None


class CsvRows(TextRows):
    """Rows of a ``.csv`` or ``.tsv`` file with a header, every cell as the text it is: ``007`` stays so, and ``None`` is a word. An
    empty cell is ``""``; one that a short row lacks is None. Raises `DataError` naming the file, and the row's number as a
    spreadsheet shows it."""

    empty_is_missing: ClassVar[bool] = True

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
        self.columns, self.starts, self.ends = self._index()

    def _parsed(self, raw: bytes, index: int) -> dict[str, Any]:
        csv.field_size_limit(sys.maxsize)  # pictures in base64; a process that unpickled this has the default
        cells = next(csv.reader(io.StringIO(raw.decode(), newline=""), delimiter=self.delimiter))
        if len(cells) > len(self.columns):
            raise DataError(f"{self.path}:{index % len(self) + 2}: the row has more cells than the header")
        return dict.fromkeys(self.columns) | dict(zip(self.columns, cells))

    def _index(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The header and each row's byte range: a row ends where csv's own parser asks for no further line."""
        csv.field_size_limit(sys.maxsize)
        starts: list[int] = []
        ends: list[int] = []
        try:
            with self.path.open("rb") as file:
                position = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            with self.path.open(encoding="utf-8-sig", newline="") as text:

                def lines() -> Iterator[str]:
                    nonlocal position
                    for line in text:
                        position += len(line) if line.isascii() else len(line.encode())
                        yield line

                reader = csv.reader(lines(), delimiter=self.delimiter)
                header = next(reader, [])
                start = position
                for cells in reader:
                    if cells:  # a blank line is no row
                        starts.append(start)
                        ends.append(position)
                    start = position
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not readable as a table of text ({error})") from None
        return header, np.array(starts, np.int64), np.array(ends, np.int64)


class Files(Sequence):
    """Several json, jsonl, csv and tsv files as one list of rows, in the order of their names."""

    def __init__(self, paths: Sequence[Path]):
        self.files = [text_rows(path) for path in paths]
        self._ends = np.cumsum([len(file) for file in self.files]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[TextRows, int]:
        """(file, row within it) of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        position = bisect.bisect_right(self._ends, index)
        return self.files[position], index - (self._ends[position - 1] if position else 0)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        file, row = self.locate(int(index))
        return file[row]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the one file, or of the files' hashes."""
        return file_hash([file.path for file in self.files])


def text_rows(path: str | Path) -> TextRows:
    """The rows of a text file, by its ending: csv and tsv, or JSON."""
    return CsvRows(path) if Path(path).suffix.lower() in (".csv", ".tsv") else JsonRows(path)


def file_hash(paths: Sequence[Path]) -> str:
    """sha256 of the one file, or of the files' hashes in their order."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def matching_files(path: Path, suffixes: Sequence[str], *, where: str) -> list[Path]:
    """The files a path means: itself, a folder's (by name), or a glob's. Raises `DataError` when there is none, or when their names say
    that one is missing."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in suffixes and not p.name.endswith(_BESIDE))
        expected = f"a file ending in {', '.join(suffixes)} inside it"
    elif any(sign in path.name for sign in "*?["):
        found = sorted(p for p in path.parent.glob(path.name) if not p.name.endswith(_BESIDE))
        expected = "a match"
    else:
        raise DataError(f"{where}: no such file or folder: {path}")
    if not found:
        raise DataError(f"{where}: {path}: expected {expected}, found none")
    if not any(sign in path.name for sign in "?["):  # those choose some of the shards
        refuse_gaps([str(file) for file in found], where, padded=True, what="files")
    return found
