"""How does any table become samples through named columns, with random access or as a stream?"""

from __future__ import annotations

import logging
import string
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm.data.blind import holds_picture, refuse_blind, refuse_other_media
from mllm.data.cells import as_list, conversation_cell, plain_cell
from mllm.data.conversations import PLACEHOLDER, message_turns, plain_text
from mllm.data.files import Files, file_hash, matching_files
from mllm.data.sources import (
    TAUGHT,
    Source,
    open_shards,
    resolve_image,
    resolve_video,
    resolve_visual,
    taught,
    video_of_cell,
    with_points,
)
from mllm.data.spec import ColumnMap, DatasetSpec, expand_path
from mllm.data.tables import SUFFIXES, is_saved, keys_of, open_files, open_hub, open_saved, undecoded
from mllm.data.tools import tools_of
from mllm.errors import AlignmentError, ConfigError, DataError, did_you_mean
from mllm.types import IMAGE_MARK, Sample, Turn

_log = logging.getLogger(__name__)
_RECENT = 32


class ColumnsSource(Source):
    """Rows of a table (`mllm.data.tables`) through a `ColumnMap`: hub id, parquet, csv, json, arrow, or a ``save_to_disk``
    folder.

    With ``streaming`` rows are read in order; asking for an earlier row starts the stream again and skips to it.
    """

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        assert spec.columns is not None
        self.columns: ColumnMap = spec.columns
        self.root: Path | None = None
        self._path: Path | None = None
        self._files: list[Path] = []
        self._table = self._load()
        self.known = self._check_columns()
        named = dict.fromkeys([*self.columns.used(), *_fields(self.spec.prompt)])
        self._used = [name for name in named if name in self.known]
        if self.shards is not None:
            self.shards.columns = self._used
        elif not isinstance(self._table, Files):
            self._table = self._undecoded(self._table)
        self.random_access = not spec.streaming and self.shards is None  # type: ignore[misc]
        self._stream: Iterator[Any] | None = None
        self._next = 0
        self._recent: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        if self.spec.streaming and self.shards is None:
            assert self.spec.rows is not None
            return self.spec.rows
        return len(self._table)

    @cached_property
    def fingerprint(self) -> str:
        if self.shards is not None:
            return self.shards.fingerprint
        if self.spec.streaming:
            return f"{self.spec.hub or self.spec.path}@{self.spec.revision}:{self.spec.subset}:{self.spec.split}"
        if self._files:  # what they hold: `datasets` goes by path and time, so that a copy would be another table
            return file_hash(self._files)
        return str(getattr(self._table, "_fingerprint", ""))

    def quarantine_path(self) -> Path:
        if self.spec.quarantine or self._path is None or not self._path.is_file():
            return super().quarantine_path()
        return self._path.with_name(self._path.name + ".quarantine.jsonl")

    def sample(self, index: int) -> Sample:
        if self.shards is not None:
            return self.sample_of(self.shards[index])
        row = {key: plain_cell(value) for key, value in self._row(index).items()}
        identity = self._identity(row, str(index))
        return self._read_row(row, identity, self.where(index, identity))

    def sample_of_row(self, row: dict[str, Any], key: str, where: str) -> Sample:
        return self._read_row(row, self._identity(row, key), where)

    def _identity(self, row: Mapping[str, Any], key: str) -> str:
        name = self.columns.id
        return str(row[name]) if name and row.get(name) is not None else key

    def _read_row(self, row: dict[str, Any], identity: str, where: str) -> Sample:
        columns = self.columns
        picture = columns.image or columns.images
        if picture and picture not in row and self.shards is not None and self.shards.of_members:
            raise DataError(f"{where}: there is no member {picture}; found {', '.join(row)}")
        found = as_list(row.get(columns.image or columns.images or ""))
        films = as_list(row.get(columns.video)) if columns.video else []
        meta = {name: row.get(name) for name in columns.meta}
        if columns.messages is not None:
            messages = conversation_cell(row[columns.messages], where)
            videos = [video_of_cell(item, where) for item in films]
            turns, images = message_turns(messages, found, where=where, videos=videos)
            images = [resolve_visual(item, self.root, where) for item in images]
            if row.get("tools"):
                meta["tools"] = tools_of(row, where)
        else:
            images = [resolve_image(item, self.root, where) for item in found]
            images += [resolve_video(item, self.root, where) for item in films]
            turns = self._question(row, len(images), meta, where)
        refuse_other_media(row, where, [columns.video] if columns.video else [])
        if not images and not self.spec.typed_images:
            read = [name for name in (columns.image, columns.images) if name]
            refuse_blind(row, turns, known=read, where=where, keys=self.known, cure="columns.image: {}")
        if columns.system is not None and row.get(columns.system):
            _refuse_structure(row[columns.system], columns.system, where)
            turns = [Turn("system", plain_text(str(row[columns.system]))), *turns]
        names = {name: getattr(columns, name) for name in TAUGHT}
        told = taught(row, self.root, len(images), where, names)
        return Sample(identity, turns, with_points(images, told), self.name, meta, **told)

    def _question(self, row: Mapping[str, Any], num_images: int, meta: dict[str, Any], where: str) -> list[Turn]:
        assert self.columns.question is not None and self.columns.answer is not None
        answers = as_list(row.get(self.columns.answer))
        if not answers or row.get(self.columns.question) is None:
            raise DataError(f"{where}: {self.columns.question if answers else self.columns.answer} is empty")
        if len(answers) > 1:
            meta["answers"] = [str(answer) for answer in answers]
        values = {**row, "question": row[self.columns.question]}
        for name in _fields(self.spec.prompt):
            if values.get(name) is None:
                raise DataError(f"{where}: {name} is empty, and the prompt shows it")
            _refuse_structure(values[name], self.columns.question if name == "question" else name, where)
        _refuse_structure(answers[0], self.columns.answer, where)
        text = self._shown(plain_text(self.spec.prompt.format_map(values)), num_images, where)
        return [Turn("user", text), Turn("assistant", plain_text(str(answers[0])))]

    def _shown(self, text: str, num_images: int, where: str) -> str:
        """The prompt with its pictures: where ``<image>`` stands, else before the text. Raises `AlignmentError` when there
        are more or fewer marks than pictures."""
        marks = 0 if self.spec.typed_images else text.count(PLACEHOLDER)
        if not num_images or not marks:
            return (IMAGE_MARK + "\n") * num_images + text
        if marks != num_images:
            raise AlignmentError(
                f"{where}: {marks} {PLACEHOLDER} placeholders in the prompt and {num_images} images (typed_images: true says "
                "that they are text)"
            )
        return text.replace(PLACEHOLDER, IMAGE_MARK)

    def _row(self, index: int) -> Mapping[str, Any]:
        if isinstance(self._table, Files):
            return self._text_row(self._table, index)
        if not self.spec.streaming:
            return self._table[index]
        if index in self._recent:  # a substitute was taken from here before its own turn came
            return self._recent[index]
        if self._stream is None or index < self._next:
            self._stream, self._next = iter(self._table.skip(index)), index
        stream = self._stream
        assert stream is not None
        while True:
            try:
                row = next(stream)
            except StopIteration:
                raise self._ended(index) from None
            self._recent[self._next] = row
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
            self._next += 1
            if self._next > index:
                return row

    def _text_row(self, rows: Files, index: int) -> Mapping[str, Any]:
        """The columns that are used, of a row as it is written. A csv can say in no other way that a cell holds nothing than by
        leaving it empty."""
        if index >= len(rows):
            raise self._ended(index)
        file, number = rows.locate(index)
        row = file[number]
        return {name: None if row.get(name) == "" and file.empty_is_missing else row.get(name) for name in self._used}

    def _ended(self, index: int) -> DataError:
        return DataError(f"{self.name}: the stream has no row {index}, and rows declares {len(self)}; correct rows")

    def _load(self) -> Any:
        spec, where = self.spec, f"dataset {self.spec.name}"
        if spec.hub is not None:
            if spec.revision is None:
                _log.warning("%s: no revision of %s is pinned; the rows may change under a run", spec.name, spec.hub)
            if spec.image_root:
                self.root = expand_path(spec.image_root, where=where)
            return open_hub(
                spec.hub, spec.subset, split=spec.split, revision=spec.revision, where=where, streaming=spec.streaming
            )
        assert spec.path is not None
        self.shards = open_shards(spec)
        if self.shards is not None:
            if spec.image_root:
                self.root = expand_path(spec.image_root, where=where)
            return self.shards
        path = self._path = expand_path(spec.path, where=where)
        self.root = (
            expand_path(spec.image_root, where=where) if spec.image_root else (path if path.is_dir() else path.parent)
        )
        if is_saved(path):
            return open_saved(path, spec.split, where=where, streaming=spec.streaming)
        self._files = matching_files(path, SUFFIXES, where=where)
        return open_files(self._files, where=where, streaming=spec.streaming)

    def _check_columns(self) -> list[str]:
        """The table's columns, once those that are named are among them and none that shows something is forgotten."""
        needed = [*self.columns.used(), *_fields(self.spec.prompt)]
        if isinstance(self._table, Files):
            known = keys_of(self._table, [name for name in needed if name != "question"])
        elif self.shards is not None:
            known = [str(name) for name in self.shards.first_row()]
        else:
            known = self._table.column_names
        if known is None:  # a stream whose features are not declared
            known = list(next(iter(self._table)))
        for name in needed:
            if name not in known and name != "question":
                raise ConfigError(
                    f"dataset {self.spec.name}: columns: no column {name!r}{did_you_mean(name, known)}. "
                    f"Columns: {', '.join(known)}"
                )
        if self.columns.image is None and self.columns.images is None and self.columns.video is None:
            self._refuse_forgotten_pictures()
        return list(known)

    def _refuse_forgotten_pictures(self) -> None:
        """Raises `ConfigError` when a table of pictures is declared without any: every row would be learned blind."""
        if self.shards is not None:
            row = self.shards.first_row()
            pictures = [name for name, value in row.items() if holds_picture(name, value)]
        else:
            features = None if isinstance(self._table, Files) else self._table.features
            pictures = [name for name, feature in (features or {}).items() if _is_image(feature)]
        unread = [name for name in pictures if name not in self.columns.used()]
        if unread and not self.spec.typed_images:
            raise ConfigError(
                f"dataset {self.spec.name}: column {unread[0]!r} holds pictures and columns names no image, so every row would "
                f"be learned without; write columns.image: {unread[0]} (images for a list), or typed_images: true for text alone"
            )

    def _undecoded(self, table: Any) -> Any:
        """The columns that are used, images as they are stored."""
        table = undecoded(table)
        return table.select_columns(self._used) if self._used else table


def _refuse_structure(value: Any, column: str, where: str) -> None:
    """Raises `DataError` for a cell that would be learned as Python writes a list, an object or bytes."""
    if isinstance(value, (list, tuple, dict, bytes)):
        kind = "an object" if isinstance(value, dict) else "bytes" if isinstance(value, bytes) else "a list"
        raise DataError(
            f"{where}: {column} holds {kind} ({repr(value)[:60]}), expected text: give each question a row of its own, name a column of "
            "text (columns: {question: …, answer: …}), or write the row as messages"
        )


def _is_image(feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Image)


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
