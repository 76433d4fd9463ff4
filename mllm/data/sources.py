"""How does row k of a declared dataset become a `Sample`?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mllm.data.conversations import embeds_images, message_turns, placeholder_turns
from mllm.data.files import Files, matching_files
from mllm.data.spec import SOURCES, DatasetSpec, expand_path
from mllm.errors import DataError
from mllm.types import Sample


class Source(Sequence):
    """Rows of one dataset as samples; the row number and the revision decide a sample, nothing else.

    ``source[k]`` raises `DataError` or `AlignmentError` naming dataset and sample. Images are not opened:
    ``Sample.images`` holds paths, bytes or URIs.
    """

    random_access: ClassVar[bool] = True
    """False: rows come in order, going back is slow (streams)."""

    def __init__(self, spec: DatasetSpec):
        self.spec = spec

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the rows change; recorded in ``run.json`` and in quarantine lists."""
        raise NotImplementedError

    def quarantine_path(self) -> Path:
        """Where this dataset's list of bad samples lies, whether it exists or not."""
        if self.spec.quarantine:
            return expand_path(self.spec.quarantine, where=self.name)
        return Path("runs/quarantine") / f"{self.name}.jsonl"

    def sample(self, index: int) -> Sample:
        """Row ``index`` as a sample."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Sample:
        if not isinstance(index, (int, np.integer)):
            raise TypeError("a source takes one row number")
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        return self.sample(int(index))

    def where(self, index: int, identity: Any = None) -> str:
        """How errors name a sample."""
        return (
            f"{self.name}, sample {identity!r} (row {index})" if identity is not None else f"{self.name}, row {index}"
        )


class JsonSource(Source):
    """Rows of json and jsonl files, read by byte offset."""

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        assert spec.path is not None
        path = expand_path(spec.path, where=f"dataset {spec.name}")
        try:
            files = matching_files(path, (".jsonl", ".json"), where=f"dataset {spec.name}")
        except DataError as error:
            hint = f". It comes from: {' ; '.join(spec.download)}" if spec.download else ""
            hint = hint or (f". See {spec.homepage}" if spec.homepage else "")
            raise DataError(f"{error}{hint}") from None
        self.rows = Files(files)
        if not len(self.rows):
            raise DataError(f"dataset {spec.name}: {path} holds no rows")
        self.path = path
        self.root = expand_path(spec.image_root, where=f"dataset {spec.name}") if spec.image_root else None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        return self.rows.fingerprint

    def quarantine_path(self) -> Path:
        if self.spec.quarantine:
            return super().quarantine_path()
        if any(sign in self.path.name for sign in "*?["):
            return self.path.parent / ".quarantine.jsonl"
        return (
            self.path / ".quarantine.jsonl"
            if self.path.is_dir()
            else self.path.with_name(self.path.name + ".quarantine.jsonl")
        )

    def row(self, index: int) -> tuple[dict[str, Any], str, Path]:
        """(row, its id, folder its image paths start from)."""
        file, position = self.rows.locate(index)
        row = file[position]
        identity = row.get("id")
        return row, str(identity) if identity is not None else str(index), self.root or file.path.parent

    def images(self, row: dict[str, Any], root: Path, where: str) -> list[Any]:
        """``image`` (one or a list) or ``images``, paths resolved."""
        value = row.get("image") if row.get("image") not in (None, "") else row.get("images")
        return [resolve_image(item, root, where) for item in as_list(value)]


class LlavaSource(JsonSource):
    """LLaVA's json: ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``, ``<image>`` in the
    text."""

    def sample(self, index: int) -> Sample:
        row, identity, root = self.row(index)
        where = self.where(index, identity)
        images = self.images(row, root, where)
        conversation = row.get("conversations", row.get("conversation", row.get("messages")))
        if conversation is None:
            raise DataError(f"{where}: no conversations; keys are {sorted(row)}")
        if isinstance(row.get("system"), str) and row["system"]:
            conversation = [{"from": "system", "value": row["system"]}, *conversation]
        turns = placeholder_turns(conversation, len(images), where=where, image_first=self.spec.image_first)
        return Sample(
            identity, turns, images, self.name, _rest(row, "conversations", "conversation", "messages", "system")
        )


class ShareGptSource(LlavaSource):
    """ShareGPT json or jsonl: ``conversations`` or ``messages`` of ``from``/``value`` or ``role``/``content``,
    ``system`` beside them, ``image`` or ``images``."""


class MessagesSource(JsonSource):
    """OpenAI-style jsonl: ``{"messages": [{"role", "content"}], "images"?: […]}``. An ``image`` beside the messages is
    taken when they hold none themselves (flat evaluation rows have both)."""

    def sample(self, index: int) -> Sample:
        row, identity, root = self.row(index)
        where = self.where(index, identity)
        if "messages" not in row:
            raise DataError(f"{where}: no messages; keys are {sorted(row)}")
        listed = as_list(row.get("images"))
        if not listed and not embeds_images(
            row["messages"]
        ):  # a picture beside the messages, for strings or bare parts
            listed = as_list(row.get("image"))
        turns, images = message_turns(row["messages"], listed, where=where)
        images = [resolve_image(image, root, where) for image in images]
        return Sample(identity, turns, images, self.name, _rest(row, "messages"))


def open_source(spec: DatasetSpec) -> Source:
    """The source that a declaration means. Raises `DataError` when its files are missing, `ConfigError` for a bad
    format."""
    return SOURCES.get(spec.format)(spec)


def as_list(value: Any) -> list[Any]:
    """None → [], a list → itself, anything else → one entry."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, (list, tuple)):
        return [item for item in value if item is not None]
    return [value]


def resolve_image(item: Any, root: Path | None, where: str) -> Any:
    """Relative paths start from ``root``; URIs, bytes, pictures and absolute paths pass."""
    if isinstance(item, dict) and item.get("bytes") is None and isinstance(item.get("path"), str):
        item = item["path"]
    if isinstance(item, os.PathLike):
        item = os.fspath(item)
    if not isinstance(item, str) or item.startswith(("data:", "http://", "https://", "file://", "/")) or root is None:
        return item
    if not item:
        raise DataError(f"{where}: an image path is empty")
    return str(root / item)


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in {"id", "image", "images", *used}}


def read_quarantine(source: Source, path: Path | None = None) -> dict[int, str]:
    """Row → reason of a dataset's quarantine list, {} when there is none.

    Raises `DataError` when the list was made for other contents of the file (its row numbers would hit innocent
    samples).
    """
    path = path or source.quarantine_path()
    if not path.is_file():
        return {}
    bad: dict[int, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if "row" in entry:
                    bad[int(entry["row"])] = str(entry.get("reason", ""))
                elif entry["fingerprint"] != source.fingerprint:
                    raise DataError(
                        f"{path} was made for another version of {source.name} ({entry.get('rows')} rows then, "
                        f"{len(source)} now); run `mllm data check` again or delete it"
                    )
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{path}, line {number}: not an entry of a quarantine list ({error!r})") from None
    return bad
