"""What is a dataset, what is a mixture, and which YAML declares it?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mllm.config import StrictModel
from mllm.data.shards.names import is_sharded
from mllm.errors import ConfigError, did_you_mean
from mllm.registry import Registry

SOURCES: Registry = Registry(
    "dataset format",
    {
        "llava": "mllm.data.sources:LlavaSource",
        "sharegpt": "mllm.data.sources:ShareGptSource",
        "messages": "mllm.data.sources:MessagesSource",
        "columns": "mllm.data.columns:ColumnsSource",
        "refer": "mllm.data.refer:ReferSource",
        "coco_instances": "mllm.data.mask_sets:CocoInstancesSource",
        "reasonseg": "mllm.data.mask_sets:ReasonSegSource",
        "muse": "mllm.data.mask_sets:MuseSource",
        "nnunet": "mllm.data.mask_sets:NnUnetSource",
        "routing_labels": "mllm.data.routing_labels:LabelledSource",
    },
)
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


class ColumnMap(StrictModel):
    """Which columns of a table make a sample: a conversation in ``messages``, or ``question`` and ``answer``."""

    messages: str | None = None
    """List of ``{role, content}`` or ``{from, value}``."""
    question: str | None = None
    answer: str | None = None
    """Text or number; of a list the first entry is learned (all are kept in ``meta``)."""
    image: str | None = None
    """One image per row (a missing one makes a text-only sample)."""
    images: str | None = None
    """A list of images per row."""
    video: str | None = None
    """One video per row, or a list of them."""
    masks: str | None = None
    """What the answers mark: a list of files, run lengths or polygons, one for each mask token (`mllm.processing.mask_files`)."""
    poses: str | None = None
    """Cameras of the row's videos, one entry for each image and video (`mllm.processing.geometry`)."""
    depths: str | None = None
    """Depth maps, one entry for each image and video (`mllm.processing.geometry`)."""
    system: str | None = None
    id: str | None = None
    """Default: the row number."""
    meta: list[str] = Field(default_factory=list)
    """Columns to keep beside the sample."""

    @model_validator(mode="after")
    def _conversation(self) -> ColumnMap:
        if (self.messages is None) == (self.question is None):
            raise ValueError("give either messages, or question and answer")
        if (self.question is None) != (self.answer is None):
            raise ValueError("question and answer belong together; one is missing")
        if self.image is not None and self.images is not None:
            raise ValueError("give image (one per row) or images (a list per row), not both")
        return self

    def used(self) -> list[str]:
        """Every column named, once."""
        names = [
            self.messages,
            self.question,
            self.answer,
            self.image,
            self.images,
            self.video,
            self.masks,
            self.poses,
            self.depths,
            self.system,
            self.id,
            *self.meta,
        ]
        return list(dict.fromkeys(name for name in names if name is not None))


class DatasetSpec(StrictModel):
    """One source of samples: where it is, how it is read, what one may do with it."""

    name: str = ""
    """Default: the YAML file's name."""
    description: str = ""
    format: str
    """``llava``, ``sharegpt``, ``messages``, ``columns``, ``refer`` (RefCOCO's own files, with masks), ``coco_instances``, ``reasonseg``,
    ``muse``, ``nnunet`` (sets of masks as they are published), or a plugin's."""
    path: str | None = None
    """Local json, jsonl, parquet, csv or arrow file, glob, or folder; ``~`` and ``$VARIABLES`` are expanded. Shards (tar, parquet,
    jsonl) that are read in order: ``s3://bucket/shard-{000000..000127}.tar``."""
    hub: str | None = None
    """Hub id of a `datasets` dataset (format columns)."""
    revision: str | None = None
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    image_root: str | None = None
    """Folder that relative image paths start from; default: the folder of the file."""
    image_key: str | None = None
    """Formats llava, sharegpt and messages: the row's key for its picture or pictures; default: ``image`` or ``images``."""
    typed_images: bool = False
    """``<image>`` in a row without pictures is text that somebody typed. Without this such a row is refused: a model would
    be trained blind when pictures lie under another key."""
    visual_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of each picture of these rows, for views that can choose (tiles, native): fewer tiles, or a smaller picture.
    The same rows at several numbers, as several datasets of a mixture, teach a model that can be asked at any of them (`mllm eval
    budgets`)."""
    columns: ColumnMap | None = None
    prompt: str = "{question}"
    """Format columns: what the user says; ``{column}`` for any column. Formats of masks: with what is marked as ``{question}``."""
    image_first: bool = False
    """Formats llava and sharegpt: move every turn's images before its text, as LLaVA's own training does."""
    streaming: bool = False
    """Read rows in order without downloading all; needs ``rows``."""
    quarantine: str | None = None
    """List of bad samples (`mllm data check` writes it); default: beside the file, honoured when it exists."""
    rows: int | None = Field(default=None, ge=1)
    """How many rows there are, for the table (and for the length of an epoch when streaming, or reading shards of tar or jsonl)."""
    shuffle_buffer: int | None = Field(default=None, ge=1)
    """Shards: rows that each worker holds, shuffles and (packing) packs together; default: 512."""
    licence: str = "unknown"
    """Annotations' licence, SPDX name where there is one."""
    image_licence: str = "unknown"
    commercial: bool | None = None
    homepage: str = ""
    download: list[str] = Field(default_factory=list)
    """What to fetch by hand when ``path`` is missing."""
    _recognised: str | None = PrivateAttr(default=None)

    @property
    def recognised(self) -> str | None:
        """How data without a declaration are read; None for what was declared."""
        return self._recognised

    def with_note(self, note: str) -> DatasetSpec:
        """The same, saying how it came about."""
        self._recognised = note
        return self

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in SOURCES:
            raise ValueError(
                f"unknown dataset format {value!r}{did_you_mean(value, SOURCES)}. Known: {', '.join(SOURCES)}"
            )
        return value

    @model_validator(mode="after")
    def _origin(self) -> DatasetSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path (local file or folder) and hub (hub id)")
        if self.hub is None and (self.revision is not None or self.subset is not None):
            raise ValueError("revision and subset belong to a hub dataset; path is given")
        if self.format == "columns":
            if self.columns is None:
                raise ValueError("format columns needs columns: which column is the question, the answer, the image")
            if self.image_key is not None:
                raise ValueError("format columns takes its picture from columns.image or columns.images, not image_key")
        else:
            if self.columns is not None:
                raise ValueError(f"columns belongs to format columns, not {self.format}")
            if self.image_key is not None and self.format not in ("llava", "sharegpt", "messages"):
                raise ValueError("image_key belongs to the formats llava, sharegpt and messages")
            if self.hub is not None and self.format in ("llava", "sharegpt", "messages"):
                raise ValueError(
                    f"a hub dataset is read by format columns, not {self.format} (columns: {{messages: …}})"
                )
            if self.streaming and not is_sharded(self.path) and self.format in ("llava", "sharegpt", "messages"):
                raise ValueError(
                    "streaming is for format columns; json and jsonl files are read row by row from disk anyway"
                )
        if self.shuffle_buffer is not None and not is_sharded(self.path):
            raise ValueError(
                "shuffle_buffer belongs to shards (s3://…, shard-{000..127}.tar); other data are shuffled as a whole"
            )
        if self.streaming and self.rows is None and not is_sharded(self.path):
            raise ValueError("streaming needs rows: how many rows make one epoch")
        return self


class MixtureItem(StrictModel):
    """One dataset's part in a mixture."""

    dataset: str | DatasetSpec
    """Name of a YAML in data/datasets, or a whole declaration."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, relative to the others' weights; all datasets of a mixture give one, or none does."""
    repeat: float | None = Field(default=None, gt=0)
    """Passes over the dataset per epoch (default 1; 0.5 takes half of it, another half in the next epoch)."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""


class MixtureSpec(StrictModel):
    """Datasets and how often each is drawn."""

    name: str = ""
    description: str = ""
    datasets: list[MixtureItem] = Field(min_length=1)
    epoch_size: int | None = Field(default=None, ge=1)
    """Samples per epoch, with weights; default: the sum of the datasets' rows."""

    @model_validator(mode="after")
    def _weights(self) -> MixtureSpec:
        weighted = [item.weight is not None for item in self.datasets]
        if any(weighted):
            if not all(weighted):
                raise ValueError(
                    "some datasets have a weight and some have none; give every one a weight, or use repeat"
                )
            if any(item.repeat is not None for item in self.datasets):
                raise ValueError("weight and repeat exclude each other within one mixture")
        elif self.epoch_size is not None:
            raise ValueError("epoch_size belongs to weights; with repeat the epoch's size follows from the rows")
        return self


def expand_path(path: str, *, where: str) -> Path:
    """``~`` and ``$VARIABLES`` filled in. Raises `ConfigError` naming a variable that is not set."""
    return Path(expand_text(path, where=where))


def expand_text(path: str, *, where: str) -> str:
    """`expand_path` of what may be no path of this machine: ``s3://$BUCKET/shard-{000..127}.tar``."""
    expanded = os.path.expandvars(path)
    if missing := _VARIABLE.search(expanded):
        variable = missing.group(1).strip("{}")
        raise ConfigError(f"{where}: {path} uses ${variable}, which is not set; export {variable}=/where/the/data/is")
    return os.path.expanduser(expanded)  # noqa: PTH111 (a `Path` would make s3:/ of s3://)
