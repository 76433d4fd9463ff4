"""How are predictions kept so that a killed run loses none and doubles none?"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError
from mllm.eval.ids import Ids, RowIndex

Row = dict[str, Any]
_SYNC_SECONDS = 0.25
_NAMED = 5


def prediction_path(folder: Path, task: str, blind: str | None = None, rank: int = 0, world: int = 1) -> Path:
    """``task.jsonl``, ``task.blind-gray.jsonl``, with ``.shard-0002-of-0008`` before the suffix for one of several
    processes."""
    mode = f".blind-{blind}" if blind else ""
    shard = f".shard-{rank:04d}-of-{world:04d}" if world > 1 else ""
    return Path(folder) / f"{task}{mode}{shard}.jsonl"


def header_path(path: Path) -> Path:
    """The file that says what a prediction file was made with."""
    return path.with_suffix(".run.json")


def read_predictions(path: Path) -> list[Row]:
    """Every row of a finished or interrupted prediction file; a torn last line is left out. Raises `DataError` for
    damage elsewhere and for an id that occurs twice, naming them."""
    return list(iterate_predictions(path))


def iterate_predictions(path: Path) -> Iterator[Row]:
    """The rows of `read_predictions` one after another: a file of a million is never in memory as a whole."""
    return (row for row, _ in _lines(Path(path)))


def _lines(path: Path) -> Iterator[tuple[Row, bytes]]:
    """(row, its line) of every whole line."""
    seen = Ids()
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                return  # torn: every whole line ends with a newline
            try:
                row = json.loads(line)
                name = row["id"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}:{number}: damaged line; remove it to have that sample answered again"
                ) from None
            if not seen.add(name):
                raise DataError(f"{path}:{number}: id {name!r} occurs twice")
            yield row, line


def rows_in_order(path: Path, ids: Sequence[str]) -> Iterator[Row]:
    """The rows of these ids in their order, whatever the file's; ids without a row are passed over. Of each row 16 bytes are kept where
    the orders differ."""
    if all(
        row["id"] == name for row, name in itertools.zip_longest(iterate_predictions(path), ids, fillvalue={"id": None})
    ):
        yield from iterate_predictions(path)
        return
    with RowIndex() as index:
        index.add(path, _places(path))
        yield from (row for name in ids if (row := index.row(name)) is not None)


def _torn(path: Path) -> bool:
    """Whether the last line was cut short."""
    with path.open("rb") as handle:
        if not handle.seek(0, os.SEEK_END):
            return False
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) != b"\n"


class PredictionWriter:
    """Appends rows, one JSON line each. A line goes to the operating system in one write, so a killed process leaves
    whole lines and at most one torn one; the disk is synced at most every quarter second and at the end."""

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        resume: bool = True,
        stands: Callable[[Row], bool] = lambda row: True,
    ):
        """Opens (or resumes) the file. ``done`` then holds the ids of the rows that stand: the torn line, answers that
        failed and those that ``stands`` denies (to pictures that are others now) are dropped.

        Raises `ConfigError` when the file was made with another model, task, data or settings.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done = Ids()
        if resume and self.path.exists():
            self._check_header(header)
            dropped = _torn(self.path)
            for row in iterate_predictions(self.path):
                if not row.get("error") and stands(row):
                    self.done.add(row["id"])
                else:
                    dropped = True
            if dropped:
                write_lines(self.path, (row for row in iterate_predictions(self.path) if row["id"] in self.done))
        else:
            self.path.unlink(missing_ok=True)
        write_atomic(header_path(self.path), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()

    def _check_header(self, header: Mapping[str, Any]) -> None:
        try:
            before = json.loads(header_path(self.path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{self.path} has no readable {header_path(self.path).name} beside it, so what made it is unknown; "
                "choose another output folder, or start over with resume off"
            ) from None
        old, new = before.get("identity", {}), dict(header["identity"])
        differing = [key for key in new if old.get(key) != new[key]]
        if differing:
            differences = "; ".join(f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in differing)
            raise ConfigError(
                f"{self.path} holds answers of another run ({differences}). Choose another output folder, or "
                "start over with resume off"
            )

    def append(self, row: Row) -> None:
        """Write one row. Raises `DataError` when its id is already there."""
        if row["id"] in self.done:
            raise DataError(f"{self.path}: id {row['id']!r} was answered twice")
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, data[written:])
        self.done.add(row["id"])
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def other_files(path: Path, header: Mapping[str, Any]) -> list[Path]:
    """The same run's other files of one task: shards of other processes, whatever their number, and the joined file. Files of
    another identity are left out."""
    stem = path.name.removesuffix(".jsonl").split(".shard-")[0]
    found = []
    for other in [path.with_name(f"{stem}.jsonl"), *sorted(path.parent.glob(f"{stem}.shard-*.jsonl"))]:
        try:
            before = json.loads(header_path(other).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if other != path and other.exists() and before.get("identity") == header["identity"]:
            found.append(other)
    return found


def answered_elsewhere(path: Path, header: Mapping[str, Any]) -> RowIndex:
    """Answers in the same run's other files: a run that goes on with another number of processes finds its questions there.
    Damaged files count up to the damage."""
    index = RowIndex()
    for other in other_files(path, header):
        with contextlib.suppress(DataError):
            index.add(other, _places(other, failed=False))
    return index


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's text: readers see the old or the new one, whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(path)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Replace a prediction file by these rows."""
    _write_parts(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def _write_parts(path: Path, parts: Iterable[bytes]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as handle:
            handle.writelines(parts)
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)


def merge_shards(folder: Path, task: str, expected: Sequence[str], world: int, *, blind: str | None = None) -> Path:
    """Join the shard files of ``world`` processes into one file, in the order of ``expected`` ids. What they lack is taken from
    the run's other files: shards of another number of processes, and the joined file that was there.

    Raises `DataError` when a shard is missing, an id is missing, doubled or unknown, or the shards were made with
    different settings; nothing is written then.
    """
    target = prediction_path(folder, task, blind)
    paths = [prediction_path(folder, task, blind, rank, world) for rank in range(world)]
    if absent := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{task}: {len(absent)} of {world} shards are missing: {', '.join(absent[:5])}")
    headers = [json.loads(header_path(path).read_text(encoding="utf-8")) for path in paths]
    for path, header in zip(paths, headers):
        if header["identity"] != headers[0]["identity"]:
            raise DataError(
                f"{task}: {path.name} was made with other settings than {paths[0].name}; run that shard again"
            )
    with RowIndex() as index, RowIndex() as others:
        for path in paths:
            index.add(path, _places(path))
        if (double := index.doubled()) is not None:
            raise DataError(f"{task}: id {double[0]!r} is in more than one shard (again in {double[1].name})")
        lacking = sum(index.line(name) is None for name in expected)
        extra = len(index) - (len(expected) - lacking)
        for other in other_files(paths[0], headers[0]) if lacking else ():
            if other not in paths:
                others.add(other, _places(other, failed=False))
        missing = (
            [name for name in expected if index.line(name) is None and others.line(name) is None] if lacking else []
        )
        if missing or extra:
            raise DataError(
                f"{task}: the shards do not add up to the benchmark: ids {_differences(missing, extra, expected, paths)}"
            )
        _write_parts(target, (index.line(name) or others.line(name) or b"" for name in expected))
    header = headers[0] | {"shards": world}
    write_atomic(header_path(target), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    return target


def _differences(missing: Sequence[str], extra: int, expected: Iterable[str], paths: Sequence[Path]) -> str:
    """What shards lack and have too many of, in words."""
    told = [f"{len(missing)} missing ({', '.join(missing[:_NAMED])})"] if missing else []
    if extra:
        known = Ids(expected)
        names = heapq.nsmallest(_NAMED, (name for path in paths for name, _ in _places(path) if name not in known))
        told.append(f"{extra} unknown ({', '.join(names)})")
    return " and ".join(told)


def _places(path: Path, *, failed: bool = True) -> Iterator[tuple[str, int]]:
    """(id, where its line begins) of every row. failed: also of those whose generation failed."""
    place = 0
    for row, line in _lines(path):
        if failed or not row.get("error"):
            yield row["id"], place
        place += len(line)


def iterate_files(place: Path) -> Iterator[Path]:
    """Prediction files of a run: the file itself, or every unsharded, sighted one in a folder."""
    place = Path(place)
    if place.is_file():
        yield place
        return
    for path in sorted(place.glob("*.jsonl")):
        if ".blind-" not in path.name and ".shard-" not in path.name and header_path(path).exists():
            yield path
