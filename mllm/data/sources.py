"""How does row k of a declared dataset become a `Sample`?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mllm.data.blind import refuse_blind, refuse_other_media
from mllm.data.cells import as_list, conversation_cell, given, plain_cell
from mllm.data.conversations import embeds_images, message_turns, of_preferences, place_videos, placeholder_turns
from mllm.data.files import Files, matching_files
from mllm.data.shards.names import is_sharded
from mllm.data.shards.read import Item
from mllm.data.shards.rows import ShardRows
from mllm.data.spec import SOURCES, DatasetSpec, expand_path, expand_text
from mllm.data.tools import tools_of
from mllm.errors import DataError, blamed_on
from mllm.references import refer
from mllm.types import VISUAL_TOKENS, Sample, Turn, Video

VIDEO_KEYS = ("video", "videos")
"""Keys that a row's videos are read from."""
TAUGHT = ("masks", "poses", "depths")
_FILES = ("path", "frames", "poses", "depths")
"""Keys of an entry of geometry that hold files."""
"""Keys that hold what heads learn."""


class Source(Sequence):
    """Rows of one dataset as samples; the row number and the revision decide a sample, nothing else.

    ``source[k]`` raises `DataError` or `AlignmentError` naming dataset and sample. Images are not opened:
    ``Sample.images`` holds paths, bytes or URIs.
    """

    random_access: ClassVar[bool] = True
    """False: rows come in order, going back is slow (streams)."""
    shards: ShardRows | None = None
    """Of rows that lie in shards, these: training reads each by itself."""

    def __init__(self, spec: DatasetSpec):
        self.spec = spec

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the rows change; recorded in ``run.json`` and in quarantine lists."""
        raise NotImplementedError

    @property
    def reading(self) -> str:
        """How rows become samples, as far as the declaration decides it: the other half of what a sample's text is."""
        fields = ("format", "columns", "prompt", "image_first", "image_key", "typed_images")
        written = self.spec.model_dump(mode="json")
        # Named only where it is set, so that tables of lengths from before it existed are still found.
        budget = {} if self.spec.visual_tokens is None else {"visual_tokens": self.spec.visual_tokens}
        return json.dumps({name: written[name] for name in fields} | budget, sort_keys=True)

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
        number = int(index)
        with blamed_on(self.where(number)):
            sample = self.sample(number)
        _refuse_half_characters(sample, self.where(number, sample.id))
        return self._bounded(sample)

    def sample_of(self, item: Item) -> Sample:
        """A shard's row as a sample. Raises `DataError` or `AlignmentError` naming shard and sample."""
        where = self.where_of(item)
        with blamed_on(where):
            if item.row is None:
                raise DataError(f"{where}: {item.problem}")
            row = {key: plain_cell(value) for key, value in item.row.items()}
            sample = self.sample_of_row(row, item.key, where)
        _refuse_half_characters(sample, where)
        return self._bounded(sample)

    def _bounded(self, sample: Sample) -> Sample:
        if self.spec.visual_tokens is not None:
            sample.meta[VISUAL_TOKENS] = self.spec.visual_tokens
        return sample

    def sample_of_row(self, row: dict[str, Any], key: str, where: str) -> Sample:
        """A row as it is written in a shard, as a sample. key: its id, where it brings none."""
        raise NotImplementedError

    def where_of(self, item: Item) -> str:
        """How errors name a shard's row."""
        named = f", sample {item.key!r}" if item.key and item.key != str(item.number) else ""
        return f"{self.name}, {item.shard}, row {item.number}{named}"

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
        self.root = expand_path(spec.image_root, where=f"dataset {spec.name}") if spec.image_root else None
        self.shards, self.rows = open_shards(spec), Files(())
        if self.shards is not None:
            self.random_access = False  # type: ignore[misc]
            return
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

    def __len__(self) -> int:
        return len(self.rows if self.shards is None else self.shards)

    @cached_property
    def fingerprint(self) -> str:
        return (self.rows if self.shards is None else self.shards).fingerprint

    def quarantine_path(self) -> Path:
        if self.spec.quarantine or self.shards is not None:
            return super().quarantine_path()
        if any(sign in self.path.name for sign in "*?["):
            return self.path.parent / ".quarantine.jsonl"
        return (
            self.path / ".quarantine.jsonl"
            if self.path.is_dir()
            else self.path.with_name(self.path.name + ".quarantine.jsonl")
        )

    def sample(self, index: int) -> Sample:
        if self.shards is not None:
            return self.sample_of(self.shards[index])
        row, identity, root = self.row(index)
        return self.read_row(row, identity, root, self.where(index, identity))

    def sample_of_row(self, row: dict[str, Any], key: str, where: str) -> Sample:
        identity = row.get("id")
        return self.read_row(row, str(identity) if identity is not None else key, self.root, where)

    def read_row(self, row: dict[str, Any], identity: str, root: Path | None, where: str) -> Sample:
        """A row as a sample. root: folder that its image paths start from."""
        raise NotImplementedError

    def row(self, index: int) -> tuple[dict[str, Any], str, Path]:
        """(row, its id, folder its image paths start from)."""
        file, position = self.rows.locate(index)
        row = {key: plain_cell(value) for key, value in file[position].items()}
        identity = row.get("id")
        return row, str(identity) if identity is not None else str(index), self.root or file.path.parent

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys that a row's pictures are read from, the first that holds something."""
        return (self.spec.image_key,) if self.spec.image_key else ("image", "images")

    def images(self, row: dict[str, Any], root: Path | None, where: str) -> list[Any]:
        """``image`` (one or a list) or ``images``, or what the declaration names; paths resolved."""
        self._refuse_two(row, self.image_keys, where)
        value = next((row[key] for key in self.image_keys if given(row.get(key))), None)
        return [resolve_image(item, root, where) for item in as_list(value)]

    def videos(self, row: dict[str, Any], root: Path | None, where: str) -> list[Video]:
        """``video`` (one or a list) or ``videos``; paths resolved."""
        self._refuse_two(row, VIDEO_KEYS, where)
        return [resolve_video(item, root, where) for item in self.video_cells(row)]

    def _refuse_two(self, row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
        """Raises for a row with other pictures under each of two keys: one of them would be left out without a word."""
        filled = [key for key in keys if given(row.get(key))]
        if len(filled) > 1 and not same_cells(as_list(row[filled[0]]), as_list(row[filled[1]])):
            way = f"name the one to read (image_key: {filled[0]})" if keys is not VIDEO_KEYS else "take one out"
            raise DataError(f"{where}: {filled[0]!r} and {filled[1]!r} both hold something, and not the same; {way}")

    def video_cells(self, row: Mapping[str, Any]) -> list[Any]:
        """A row's entries for videos as they stand there."""
        return as_list(next((row[key] for key in VIDEO_KEYS if given(row.get(key))), None))

    def refuse_blind(self, row: dict[str, Any], turns: list[Turn], images: list[Any], where: str) -> None:
        """Raises for a row that would be learned without what it shows (`mllm.data.blind`)."""
        refuse_other_media(row, where, VIDEO_KEYS)
        if not images and not self.spec.typed_images:
            refuse_blind(row, turns, known=self.image_keys, where=where)


class LlavaSource(JsonSource):
    """LLaVA's json: ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``, ``<image>`` in the
    text."""

    def read_row(self, row: dict[str, Any], identity: str, root: Path | None, where: str) -> Sample:
        images = self.images(row, root, where)
        keys = ("conversations", "conversation", "messages")
        conversation = next((row[key] for key in keys if row.get(key) is not None), None)
        if conversation is None:
            raise DataError(f"{where}: no conversations; keys are {sorted(row)}{of_preferences(row)}")
        conversation = conversation_cell(conversation, where)
        if isinstance(row.get("system"), str) and row["system"]:
            conversation = [{"from": "system", "value": row["system"]}, *conversation]
        videos = self.videos(row, root, where)
        if videos:
            conversation, images = place_videos(conversation, images, videos, where=where)
        turns = placeholder_turns(conversation, len(images), where=where, image_first=self.spec.image_first)
        self.refuse_blind(row, turns, images, where)
        meta = _rest(row, *keys, "system", *TAUGHT, *self.image_keys, *VIDEO_KEYS)
        told = taught(row, root, len(images), where)
        return Sample(identity, turns, with_points(images, told), self.name, meta, **told)


class ShareGptSource(LlavaSource):
    """ShareGPT json or jsonl: ``conversations`` or ``messages`` of ``from``/``value`` or ``role``/``content``,
    ``system`` beside them, ``image`` or ``images``."""


class MessagesSource(JsonSource):
    """OpenAI-style jsonl: ``{"messages": [{"role", "content"}], "images"?: […]}``. An ``image`` beside the messages is
    taken when they hold none themselves (flat evaluation rows have both)."""

    def read_row(self, row: dict[str, Any], identity: str, root: Path | None, where: str) -> Sample:
        if "messages" not in row:
            raise DataError(f"{where}: no messages; keys are {sorted(row)}{of_preferences(row)}")
        messages = conversation_cell(row["messages"], where)
        self._refuse_two(row, self.image_keys, where)
        self._refuse_two(row, VIDEO_KEYS, where)
        listed = as_list(row.get(self.spec.image_key or "images"))
        if not listed and self.spec.image_key is None and not embeds_images(messages):
            listed = as_list(row.get("image"))  # a picture beside the messages, for strings or bare parts
        films = [video_of_cell(item, where) for item in self.video_cells(row)]
        turns, images = message_turns(messages, listed, where=where, videos=films)
        self.refuse_blind(row, turns, images, where)
        images = [resolve_visual(image, root, where) for image in images]
        meta = _rest(row, "messages", *TAUGHT, *self.image_keys, *VIDEO_KEYS)
        if row.get("tools"):
            meta["tools"] = tools_of(row, where)
        told = taught(row, root, len(images), where)
        return Sample(identity, turns, with_points(images, told), self.name, meta, **told)


def same_cells(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists of a row hold the same; what cannot be compared (arrays of other shapes) does not."""
    try:
        return bool(first == second)
    except ValueError:
        return False


def _refuse_half_characters(sample: Sample, where: str) -> None:
    """Raises `DataError` for half of a surrogate pair, which JSON can write and no tokenizer reads."""
    for turn in sample.turns:
        text = turn.content
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the {turn.role}'s turn holds half of a surrogate pair ({text[error.start]!a}, character "
                f"{error.start}): a character that was cut in two, often an emoji; write it whole or take it out"
            ) from None


def open_shards(spec: DatasetSpec) -> ShardRows | None:
    """The shards that a declaration's path means; None where it means files that are read by row number."""
    if spec.path is None:
        return None
    pattern = expand_text(spec.path, where=f"dataset {spec.name}")
    return ShardRows(pattern, rows=spec.rows, name=spec.name) if is_sharded(pattern) else None


def open_source(spec: DatasetSpec) -> Source:
    """The source that a declaration means. Raises `DataError` when its files are missing, `ConfigError` for a bad
    format."""
    return SOURCES.get(spec.format)(spec)


def resolve_visual(item: Any, root: Path | None, where: str) -> Any:
    """`resolve_image` of a picture, `resolve_video` of a `Video`."""
    return resolve_video(item, root, where) if isinstance(item, Video) else resolve_image(item, root, where)


def resolve_video(item: Any, root: Path | None, where: str) -> Video:
    """A video's entry as it is kept in a sample: a path, ``data:`` URI or bytes; ``{"path" | "bytes" | "frames": list of pictures,
    "fps", "seconds", "start", "end", "numbers", "points"}``. Relative files start from ``root``."""
    video = video_of_cell(item, where)
    source, points = video.source, video.points
    if isinstance(source, (list, tuple)):
        found: Any = [resolve_image(frame, root, where) for frame in source]
    else:
        found = resolve_image(source, root, where)
    return replace(video, source=found, points=None if points is None else _placed(points, root, f"{where}: points"))


def video_of_cell(item: Any, where: str) -> Video:
    """A video's entry with its files as they are named there. Raises `DataError` for a key that nothing reads."""
    try:
        return item if isinstance(item, Video) else Video(item)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def resolve_image(item: Any, root: Path | None, where: str) -> Any:
    """A picture's entry as it is kept in a sample: files as paths, relative ones from ``root``; all else as it is. Raises
    `DataError` for what refers to no picture."""
    reference = refer(item, where=where, root=root)
    local = reference.kind in ("file", "codes") and isinstance(reference.value, (str, Path))
    return str(reference.value) if local else item


def taught(
    row: Mapping[str, Any], root: Path | None, count: int, where: str, names: Mapping[str, str | None] | None = None
) -> dict[str, list[Any]]:
    """What heads learn of a row, under the names that a `Sample` has for it. count: images and videos of the row; names: `TAUGHT` → the
    row's keys for it, where they differ. Raises `DataError` for values of another form."""
    cells = {name: row.get(name if names is None else names[name] or "") for name in TAUGHT}
    return {
        "masks": mask_entries(cells["masks"], root, where),
        "poses": geometry_entries(cells["poses"], root, count, f"{where}: poses"),
        "depths": geometry_entries(cells["depths"], root, count, f"{where}: depths"),
    }


def with_points(images: Sequence[Any], told: Mapping[str, Sequence[Any]]) -> list[Any]:
    """A row's images and videos, each video with the row's poses and depths of it, by which its frames may be chosen, or with poses
    alone, which tell its cameras. told: as `taught` gives it."""
    poses, depths = told["poses"], told["depths"] or [None] * len(told["poses"])
    if not len(poses) == len(depths) == len(images):
        return list(images)
    return [
        replace(image, points={"poses": pose} if depth is None else {"poses": pose, "depths": depth})
        if isinstance(image, Video) and image.points is None and pose is not None
        else image
        for image, pose, depth in zip(images, poses, depths, strict=True)
    ]


def geometry_entries(value: Any, root: Path | None, count: int, where: str) -> list[Any]:
    """A row's ``poses`` or ``depths`` as a sample keeps them: one entry for each image or video, files as paths, relative ones from
    ``root``. A row of one visual may hold the entry itself, where it is a file or a mapping. Raises `DataError`."""
    if value is None:
        return []
    if isinstance(value, (str, Mapping)) and count == 1:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"{where}: is {type(value).__name__}; expected a list, one entry for each image and video, in their order"
        )

    return [_placed(item, root, where) for item in value]


def _placed(item: Any, root: Path | None, where: str) -> Any:
    """An entry of geometry with its files as paths, relative ones from ``root``."""
    if isinstance(item, str):
        reference = refer(item, where=where, root=root)
        return str(reference.value) if reference.kind == "file" else item
    if isinstance(item, Mapping):
        return {key: _placed(part, root, where) if key in _FILES else part for key, part in item.items()}
    return [_placed(part, root, where) for part in item] if isinstance(item, (list, tuple)) else item


def mask_entries(value: Any, root: Path | None, where: str) -> list[Any]:
    """A row's ``masks`` as a sample keeps them: files as paths, relative ones from ``root``; run lengths, polygons and null as they
    are. Raises `DataError` for a value that is no list."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"{where}: masks is {type(value).__name__}; expected a list, one mask for each mark in the answers"
        )

    def entry(item: Any) -> Any:
        if isinstance(item, str):
            return resolve_image(item, root, where)
        if isinstance(item, dict) and isinstance(item.get("path"), str):
            return {**item, "path": resolve_image(item["path"], root, where)}
        return item

    return [entry(item) for item in value]


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in {"id", "image", "images", *used}}
