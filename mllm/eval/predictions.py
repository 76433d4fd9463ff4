"""How are predictions kept so that a killed run loses none and doubles none?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError

Row = dict[str, Any]
_SYNC_SECONDS = 0.25


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
    rows, _ = _scan(Path(path))
    return rows


def _scan(path: Path) -> tuple[list[Row], bool]:
    """(rows, whether the last line is torn)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    rows: list[Row] = []
    seen: set[str] = set()
    lines = data.split(b"\n")
    torn = lines.pop() != b""  # every whole line ends with a newline
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name = row["id"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: damaged line; remove it to have that sample answered again") from None
        if name in seen:
            raise DataError(f"{path}:{number}: id {name!r} occurs twice")
        seen.add(name)
        rows.append(row)
    return rows, torn


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
        """Opens (or resumes) the file. ``done`` then holds the rows that stand: the torn line, answers that failed and
        those that ``stands`` denies (to pictures that are others now) are dropped.

        Raises `ConfigError` when the file was made with another model, task, data or settings.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, Row] = {}
        if resume and self.path.exists():
            self._check_header(header)
            rows, torn = _scan(self.path)
            kept = [row for row in rows if not row.get("error") and stands(row)]
            if torn or len(kept) < len(rows):
                write_lines(self.path, kept)
            self.done = {row["id"]: row for row in kept}
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
            told = "; ".join(f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in differing)
            raise ConfigError(
                f"{self.path} holds answers of another run ({told}). Choose another output folder, or "
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
        self.done[row["id"]] = row
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


def answered_elsewhere(path: Path, header: Mapping[str, Any], wanted: set[str]) -> list[Row]:
    """Answers to ``wanted`` ids in the same run's other files: a run that goes on with another number of processes
    finds its questions in other shards. Files of another identity, and damaged ones, are left alone."""
    rows: list[Row] = []
    left = set(wanted)
    stem = path.name.removesuffix(".jsonl").split(".shard-")[0]
    for other in [path.with_name(f"{stem}.jsonl"), *sorted(path.parent.glob(f"{stem}.shard-*.jsonl"))]:
        if not left or other == path or not other.exists():
            continue
        try:
            before = json.loads(header_path(other).read_text(encoding="utf-8"))
            found = _scan(other)[0] if before.get("identity") == header["identity"] else []
        except (OSError, ValueError):
            continue
        fresh = [row for row in found if row["id"] in left and not row.get("error")]
        left -= {row["id"] for row in fresh}
        rows.extend(fresh)
    return rows


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
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def shard_of(position: int, rank: int, world: int) -> bool:
    """Whether the sample at ``position`` is this process's."""
    return position % world == rank


def merge_shards(folder: Path, task: str, expected: Sequence[str], world: int, *, blind: str | None = None) -> Path:
    """Join the shard files of ``world`` processes into one file, in the order of ``expected`` ids.

    Raises `DataError` when a shard is missing, an id is missing, doubled or unknown, or the shards were made with
    different settings; nothing is written then.
    """
    paths = [prediction_path(folder, task, blind, rank, world) for rank in range(world)]
    if absent := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{task}: {len(absent)} of {world} shards are missing: {', '.join(absent[:5])}")
    headers = [json.loads(header_path(path).read_text(encoding="utf-8")) for path in paths]
    for path, header in zip(paths, headers):
        if header["identity"] != headers[0]["identity"]:
            raise DataError(
                f"{task}: {path.name} was made with other settings than {paths[0].name}; run that shard again"
            )
    rows: dict[str, Row] = {}
    for path in paths:
        for row in read_predictions(path):
            if row["id"] in rows:
                raise DataError(f"{task}: id {row['id']!r} is in more than one shard (again in {path.name})")
            rows[row["id"]] = row
    missing, extra = [name for name in expected if name not in rows], sorted(set(rows) - set(expected))
    if missing or extra:
        told = [
            f"{len(names)} {word} ({', '.join(names[:5])})"
            for names, word in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise DataError(f"{task}: the shards do not add up to the benchmark: ids {' and '.join(told)}")
    target = prediction_path(folder, task, blind)
    header = headers[0] | {"shards": world}
    write_atomic(header_path(target), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    write_lines(target, (rows[name] for name in expected))
    return target


def iterate_files(place: Path) -> Iterator[Path]:
    """Prediction files of a run: the file itself, or every unsharded, sighted one in a folder."""
    place = Path(place)
    if place.is_file():
        yield place
        return
    for path in sorted(place.glob("*.jsonl")):
        if ".blind-" not in path.name and ".shard-" not in path.name and header_path(path).exists():
            yield path
