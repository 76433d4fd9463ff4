"""What does a group of a tar file's members say as one row, by WebDataset's conventions?

``a/0001.jpg``, ``a/0001.json`` and ``a/0001.txt`` share the key ``a/0001``; what follows the name's first dot says what a member is.
The object in ``json`` is the row, and every other member is a column of it by its ending; ``image`` (``video``) holds all pictures
(videos), those that the object names first, so that every format finds them where it looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mllm.data.cells import as_list
from mllm.errors import DataError

PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
VIDEOS = ("mp4", "mkv", "webm", "avi", "mov")
_TEXTS = ("txt", "text", "transcript", "caption", "question", "answer", "prompt", "system", "id", "cls")
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def key_and_kind(name: str) -> tuple[str, str] | None:
    """(``a/0001``, ``jpg``) of ``a/0001.jpg``; None for a name without an ending."""
    match = _MEMBER.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


def row_of(key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    """One row. Raises `DataError` for a json or text member that cannot be read."""
    row: dict[str, Any] = {}
    for kind, data in members.items():
        ending = kind.rpartition(".")[2]
        if ending == "json":
            row |= _object(data, key, kind)
        elif ending in _TEXTS:
            row[kind] = _text(data, key, kind)
        elif ending not in PICTURES and ending not in VIDEOS:
            row[kind] = data
    row.setdefault("id", key)
    for column, endings in (("image", PICTURES), ("video", VIDEOS)):
        found = {kind: members[kind] for kind in _in_order(members) if kind.rpartition(".")[2] in endings}
        if found:
            _place(row, column, found, key)
            row |= found
    return row


def _place(row: dict[str, Any], column: str, found: Mapping[str, bytes], key: str) -> None:
    """The members under ``column``, in the order of their names, or where the row itself names them there."""
    name = next((name for name in (column, f"{column}s") if as_list(row.get(name))), column)
    named = as_list(row.get(name))
    if not named:
        row[name] = list(found.values())
        return
    if not all(isinstance(entry, str) for entry in named):
        return  # the row brings its own
    known = {**found, **{f"{key.rpartition('/')[2]}.{kind}": data for kind, data in found.items()}}
    matched = [known.get(entry.rpartition("/")[2]) for entry in named]
    if all(data is not None for data in matched):
        row[name] = matched
    elif len(named) == len(found) and not any(data is not None for data in matched):
        row[name] = list(found.values())  # the names of before they were packed


def _in_order(kinds: Mapping[str, Any]) -> list[str]:
    """``2.jpg`` before ``10.jpg``."""
    return sorted(kinds, key=lambda kind: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", kind)])


def _object(data: bytes, key: str, kind: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"member {key}.{kind}: not valid JSON ({error})") from None
    if kind == "json" and isinstance(value, dict):
        return value
    if kind == "json" and isinstance(value, list):  # a conversation alone
        return {"conversations": value, "messages": value}
    return {kind: value}


def _text(data: bytes, key: str, kind: str) -> str:
    try:
        return data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"member {key}.{kind}: not UTF-8 ({error.reason} at byte {error.start})") from None
