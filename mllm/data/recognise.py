"""What does a file, a folder or a hub id hold that nobody declared?"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.data.blind import holds_picture
from mllm.data.cells import conversation_cell, given, plain_cell
from mllm.data.conversations import has_exchanges, of_preferences
from mllm.data.files import JsonRows, matching_files
from mllm.data.spec import ColumnMap, DatasetSpec
from mllm.data.tables import SUFFIXES, datasets_package, is_saved, open_files, open_saved, undecoded
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.hub import hub_reason

_LOOKED_AT = 16
_HEAD = 1 << 22
_HUB_ID = re.compile(r"^([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?$")
_CONVERSATIONS = ("messages", "conversations", "conversation", "texts")
_QUESTIONS = ("question", "query", "problem", "instruction", "prompt")
_ANSWERS = ("answer", "answers", "label", "response", "output", "multiple_choice_answer")
_CHOICES = ("choices", "options")
_CURE = "write a dataset YAML with format: columns and columns: {question: …, answer: …, image: …}"


def is_data(name: str) -> bool:
    """Whether a name means data themselves (a file, a folder, a glob or a hub id) and no declaration."""
    if name.endswith((".yaml", ".yml")):
        return False
    return name.endswith(SUFFIXES) or any(s in name for s in "*?[") or Path(name).is_dir() or bool(_HUB_ID.match(name))


def recognise(name: str | Path) -> DatasetSpec:
    """A declaration for data without one, from what their first rows hold; ``spec.recognised`` says how they are read.

    name: json, jsonl, parquet, csv, tsv or arrow file, glob, folder of such (or of `datasets`' ``save_to_disk``), or hub id
    (``owner/name``, ``owner/name@revision``; train split). Raises `DataError` for what is not there, `ConfigError` when the
    rows do not tell.
    """
    text = str(name)
    path = Path(text).expanduser()
    hub = _HUB_ID.match(text) if not path.exists() and not text.endswith(SUFFIXES) else None
    if hub is not None:
        origin: dict[str, Any] = {"hub": hub[1], "revision": hub[2], "name": hub[1].replace("/", "--")}
        rows, as_json = _hub_rows(text, hub[1], hub[2]), False
    elif is_saved(path):
        origin = {"path": text, "name": path.name}
        rows, as_json = _first(open_saved(path, "train", where="data")), False
    else:
        files = _files(path)
        origin = {"path": text, "name": path.name if path.is_dir() else re.sub(r"[*?\[\]]", "", path.stem) or "data"}
        rows, as_json = list(_file_rows(files[0])), files[0].suffix in (".json", ".jsonl")
    if not rows:
        raise DataError(f"{text} holds no rows")
    return _declare(text, [plain_cell(row) for row in rows], origin, as_json)


def _declare(place: str, rows: Sequence[Mapping[str, Any]], origin: dict[str, Any], as_json: bool) -> DatasetSpec:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    _refuse_numbered_pictures(place, rows, keys)
    talk = next((key for key in _CONVERSATIONS if any(row.get(key) is not None for row in rows)), None)
    entries = (
        next((conversation_cell(row[talk], place) for row in rows if row.get(talk) is not None), []) if talk else []
    )
    if talk is not None and as_json and not (talk == "texts" or has_exchanges(entries)):
        first = entries[0] if isinstance(entries, Sequence) and entries and isinstance(entries[0], Mapping) else {}
        kind = "messages" if talk == "messages" and "from" not in first else "sharegpt"
        found = [key for key in ("images", "image") if key in keys]
        return _with_note(DatasetSpec(format=kind, **origin), f"format {kind}", found)
    question = next((key for key in _QUESTIONS if key in keys), None)
    answer = next((key for key in _ANSWERS if key in keys), None)
    if talk is None and (question is None or answer is None):
        raise ConfigError(
            f"{place}: the first row has the keys {', '.join(map(str, keys))}; expected messages, conversations, or question "
            f"and answer{of_preferences(keys) or f'. {_CURE[0].upper()}{_CURE[1:]}'}"
        )
    columns: dict[str, Any] = {"messages": talk} if talk else {"question": question, "answer": answer}
    if talk is None:
        _refuse_unasked(place, rows, str(question))
    pictures = _picture_columns(place, rows, keys)
    columns |= pictures
    columns |= {key: key for key in ("id", "system") if key in keys}
    spec = DatasetSpec(format="columns", columns=ColumnMap(**columns), **origin)
    shown = ", ".join(f"{role}: {column}" for role, column in columns.items())
    return _with_note(spec, f"format columns ({shown})", list(pictures.values()))


def _refuse_unasked(place: str, rows: Sequence[Mapping[str, Any]], question: str) -> None:
    """Raises `ConfigError` for a column without which the question is another: no row would show it."""
    for key in (*_CHOICES, *(("input",) if question == "instruction" else ())):
        if any(given(row.get(key)) for row in rows):
            raise ConfigError(
                f"{place}: {key} stands beside {question} and would not be asked. Put it into the text of {question}; or {_CURE}, "
                f'and prompt: "{{question}}\\n{{{key}}}" where {key} is text'
            )


def _refuse_numbered_pictures(place: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Raises `ConfigError` for rows with ``image`` and ``image_2``: they would be learned without the second."""
    for first in ("image", "images"):
        others = [
            key for key in keys if re.fullmatch(r"images?_?\d+", key) and any(given(row.get(key)) for row in rows)
        ]
        if others and any(given(row.get(first)) for row in rows):
            raise ConfigError(
                f"{place}: {', '.join(others)} beside {first} would not be read; give a row's pictures as one list, images: [a, b]"
            )


def _with_note(spec: DatasetSpec, how: str, pictures: Sequence[str]) -> DatasetSpec:
    seen = f"pictures from {', '.join(pictures)}" if pictures else "no column of pictures in its first rows"
    return spec.with_note(f"{spec.hub or spec.path} has no declaration; by its first rows it is read as {how}, {seen}")


def _picture_columns(place: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    found = [key for key in ("images", "image") if any(row.get(key) is not None for row in rows)]
    found = found or [key for key in keys if any(holds_picture(key, row.get(key)) for row in rows)]
    if len(found) > 1:
        raise ConfigError(f"{place}: the columns {' and '.join(found)} look like pictures; {_CURE}")
    if not found:
        return {}
    several = any(isinstance(row.get(found[0]), list) for row in rows)
    return {"images" if several else "image": found[0]}


def _files(path: Path) -> list[Path]:
    files = matching_files(path, SUFFIXES, where="data")
    kinds = {".json" if file.suffix == ".jsonl" else file.suffix for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"{path} holds {', '.join(sorted(kinds))} files; name the file, or a glob such as {path}/*.jsonl"
        )
    if not kinds <= set(SUFFIXES):
        raise ConfigError(f"{path}: expected one of {', '.join(SUFFIXES)}")
    return files


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix in (".json", ".jsonl"):
        yield from _json_rows(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row, _ in zip(
                csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), range(_LOOKED_AT)
            ):
                yield row
    else:
        yield from _first(open_files([path], where="data", streaming=True))


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The first rows, without indexing a file of gigabytes; all of it is only read where they do not fit its head."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).decode("utf-8-sig", errors="ignore")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    found = list(_list_items(head) if head.lstrip().startswith("[") else _lines(head))
    if found:
        yield from found
        return
    if head.lstrip().startswith("{") and len(head) < _HEAD:
        _refuse_one_object(path, head)
    rows = JsonRows(path)
    for number in range(min(len(rows), _LOOKED_AT)):
        yield rows[number]


def _refuse_one_object(path: Path, text: str) -> None:
    """Raises `DataError` for a file that wraps its rows in an object."""
    try:
        whole = json.loads(text)
    except ValueError:
        return
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    hint = f"; write the list under {lists[0]!r} to a file of its own" if lists else ""
    raise DataError(f"{path} holds one object, and a list of rows, or a row a line, is expected{hint}")


def _list_items(text: str) -> Iterator[Mapping[str, Any]]:
    scan, cursor = json.JSONDecoder().raw_decode, text.index("[") + 1
    for _ in range(_LOOKED_AT):
        while cursor < len(text) and text[cursor] in " \t\r\n,":
            cursor += 1
        try:
            row, cursor = scan(text, cursor)
        except ValueError:
            return
        if isinstance(row, dict):
            yield row


def _lines(text: str) -> Iterator[Mapping[str, Any]]:
    found = 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found += 1
            yield row
        if found == _LOOKED_AT:
            return


def _hub_rows(place: str, name: str, revision: str | None) -> list[Mapping[str, Any]]:
    try:
        table = datasets_package().load_dataset(name, split="train", revision=revision)
    except UnavailableError:
        raise
    except Exception as error:  # hub clients raise many kinds
        raise DataError(
            f"{place}: no such file or folder here, and no data set of that name loads from the hub: "
            f"{hub_reason(error, name)}"
        ) from error
    return _first(table)


def _first(table: Any) -> list[Mapping[str, Any]]:
    return list(undecoded(table).take(_LOOKED_AT))
