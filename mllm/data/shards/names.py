"""Which files does a pattern of shards mean, wherever they lie, and is one of them missing?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.install import package_hint

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".ndjson")
PARQUET = (".parquet",)
_ENDINGS = (*TAR, *LINES, *PARQUET)
_PROTOCOL = re.compile(r"[A-Za-z][\w+.-]+://")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^/\d][^/]*)")
_OF = re.compile(r"(.*-)(\d+)-of-(\d+)(\..+)")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "oci": "ocifs"}


def is_sharded(path: str | None) -> bool:
    """Whether a dataset's path means shards that are read in order: it names a protocol (``s3://…``), several files by braces, or tar
    files."""
    if path is None:
        return False
    if _PROTOCOL.match(path) or _BRACES.search(re.sub(r"\$\{\w+\}", "", path)) or path.endswith(TAR):
        return True
    folder = Path(path).expanduser()
    return folder.is_dir() and any(file.name.endswith(TAR) for file in folder.iterdir())


def is_tar(shard: str) -> bool:
    """Whether a shard's name says that it is a tar file."""
    return shard.endswith(TAR)


def is_local(shard: str) -> bool:
    """Whether a shard lies on a file system of this machine, where trying again mends nothing."""
    return not _PROTOCOL.match(shard) or shard.startswith(("file://", "local://", "memory://"))


def expand_braces(pattern: str) -> list[str]:
    """Every name of a pattern: ``{00..12}`` counts, keeping the digits, and ``{a,b}`` lists; several multiply."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inner, found = match.group(1), _RANGE.fullmatch(match.group(1))
    if found:
        first, last = found.groups()
        if int(last) < int(first):
            raise ConfigError(f"{pattern}: {{{inner}}} counts down; write the smaller number first")
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = inner.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for part in parts for name in expand_braces(before + part + after)]


def file_system(path: str, *, where: str) -> tuple[Any, str]:
    """(fsspec's file system of a path, the path within it). Raises `UnavailableError` naming the package that a protocol needs."""
    import fsspec

    protocol = path.partition("://")[0] if _PROTOCOL.match(path) else "file"
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError:
        package = _PACKAGES.get(protocol.rpartition("::")[2], protocol)
        raise UnavailableError(f"{where}: {path}: {protocol}:// needs {package}; {package_hint(package)}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {path}: {error}") from None


def find_shards(pattern: str, *, where: str) -> dict[str, int | None]:
    """Name → size in bytes (None: the store does not tell) of every shard that a pattern means, in order.

    pattern: names with braces, a glob, a folder, or one file; with or without a protocol. Raises `DataError` when there is none,
    when one that the braces name is missing, or when the numbers of those found have a gap; `UnavailableError` for a store whose package
    is not installed.
    """
    found: dict[str, int | None] = {}
    listings: dict[str, dict[str, int | None]] = {}
    missing: list[str] = []
    names = expand_braces(pattern)
    for name in names:
        system, inner = file_system(name, where=where)
        try:
            if any(sign in inner for sign in "*?["):
                matches = system.glob(inner, detail=True)
                found |= _named(system, name, matches.values())
                continue
            if system.protocol in ("http", "https") or "http" in system.protocol:
                found[name] = None  # such a store lists nothing: what is missing shows when it is read
                continue
            if len(names) == 1 and system.isdir(inner):
                found |= _named(system, name, system.ls(inner, detail=True), only=_ENDINGS)
                continue
            parent = system._parent(inner)
            if parent not in listings:
                listings[parent] = _listing(system, parent)
        except Exception as error:  # every store's client raises its own
            raise DataError(f"{where}: {name} cannot be listed ({_reason(error)})") from error
        size = listings[parent].get(inner.rstrip("/"), -1)
        if size == -1:
            missing.append(name)
        else:
            found[name] = size
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        total = f"of {len(names)} shards " if len(names) > 1 else ""
        verb = "are" if more else "is"
        raise DataError(
            f"{where}: {total}{missing[0]}{more} {verb} missing; fetch what is missing, or correct path: {pattern}"
        )
    if not found:
        raise DataError(f"{where}: {pattern}: expected files ending in {', '.join(_ENDINGS)}, found none")
    if not any(sign in pattern for sign in "?[{"):  # those choose some of them
        refuse_gaps(list(found), where)
    _refuse_endings(found, where)
    return found


def _listing(system: Any, folder: str) -> dict[str, int | None]:
    try:
        return {entry["name"].rstrip("/"): entry.get("size") for entry in system.ls(folder, detail=True)}
    except FileNotFoundError:
        return {}


def _named(system: Any, pattern: str, entries: Any, only: Sequence[str] = ()) -> dict[str, int | None]:
    """Entries of a listing under the names that open them, in their order."""
    protocol = bool(_PROTOCOL.match(pattern))
    files = sorted((entry["name"], entry.get("size")) for entry in entries if entry.get("type") != "directory")
    names = {system.unstrip_protocol(name) if protocol else name: size for name, size in files}
    return {name: size for name, size in names.items() if not only or name.endswith(tuple(only))}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _refuse_endings(names: Any, where: str) -> None:
    if strange := [name for name in names if not name.endswith(_ENDINGS)]:
        raise ConfigError(f"{where}: {strange[0]}: expected shards ending in {', '.join(_ENDINGS)}")
    kinds = {next(kind for kind in (TAR, LINES, PARQUET) if name.endswith(kind)) for name in names}
    if len(kinds) > 1:
        raise ConfigError(f"{where}: shards of several kinds; expected all tar, all parquet or all jsonl")


def refuse_gaps(names: Sequence[str], where: str, *, padded: bool = False, what: str = "shards") -> None:
    """Raises `DataError` where numbered names leave a number out, or say that there are more: a copy that was cut short would be
    trained on as if it were all.

    padded: numbers count only where they begin with 0 (``part-0001``, not a year); then the files meant are chosen by ? or [ ], and by
    braces else. what: the names are of.
    """
    sets: dict[tuple[str, int, str], set[int]] = {}
    lasts: dict[tuple[str, int, str], int] = {}
    for name in names:
        if match := _OF.fullmatch(name):
            before, number, total, after = match.groups()
            lasts[before, len(number), f"-of-{total}{after}"] = int(total)
            sets.setdefault((before, len(number), f"-of-{total}{after}"), set()).add(int(number))
        elif match := _NUMBERED.fullmatch(name):
            before, number, after = match.groups()
            sets.setdefault((before, len(number), after), set()).add(int(number))
    for (before, width, after), numbers in sets.items():
        first, last = min(numbers), max(numbers) + 1
        total = lasts.get((before, width, after))
        if total:
            first, last = (0, total) if last <= total else (0, 0)
        elif padded and (width < 2 or len(str(first)) == width):
            continue
        absent = list(itertools.islice((k for k in range(first, last) if k not in numbers), 1000))
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            verb = "are" if more else "is"
            some = ",".join(f"{k:0{width}d}" for k in sorted(numbers)[:4]) + (",…" if len(numbers) > 4 else "")
            choose = f"choose the {what} that are meant by ? or [ ] in the path"
            if not padded:
                choose = f"name the {what} that are meant by braces: {{{some}}}"
            raise DataError(
                f"{where}: {before}{absent[0]:0{width}d}{after}{more} {verb} missing between the {len(numbers)} {what} found; "
                f"fetch what is missing, or {choose}"
            )
