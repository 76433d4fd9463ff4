"""How do published sets of masks become questions and answers with masks: COCO's instances, ReasonSeg, MUSE, nnU-Net's layout?

Each is read as its authors publish it, nothing is converted beforehand. A row is one question about one picture; pictures and labels are
opened when the row is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.files import file_hash
from mllm.data.mask_rows import ANSWER, ANSWER_NOTHING, MaskRows
from mllm.data.sources import resolve_image
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError, MllmError
from mllm.processing.images import image_size
from mllm.processing.mask_files import IGNORE_PIXEL, read_mask, reasonseg_mask
from mllm.types import Sample


@dataclass(frozen=True)
class Asked:
    """One row. picture: its file (or files, of one channel each), as the set names it; answer: with a ``[SEG]`` for every mask; entry: what
    the set says of the masks, read by `MaskSource.masks`."""

    id: str
    picture: str | tuple[str, ...]
    question: str
    answer: str
    entry: Any
    meta: dict[str, Any] = field(default_factory=dict)


class MaskSource(MaskRows):
    """A set of masks whose rows are `Asked`."""

    rows: list[Asked]

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        where = f"dataset {spec.name}"
        try:
            self.rows = list(self.read())
        except MllmError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: {self.path} is not {self.what} ({type(error).__name__}: {error})") from None
        if not self.rows:
            raise DataError(f"{where}: {self.path} holds nothing that is marked")

    def read(self) -> Iterator[Asked]:
        """The rows, in a fixed order. Whatever it raises says that ``path`` is something else."""
        raise NotImplementedError

    def masks(self, row: Asked, size: tuple[int, int], where: str) -> list[Any]:
        """What a row's answer marks, one entry for each ``[SEG]`` as `read_mask` takes it. size: (height, width) of the picture."""
        return list(row.entry)

    def picture(self, row: Asked, where: str) -> Any:
        """The row's picture, as a sample keeps it."""
        return resolve_image(row.picture, self.root, where)

    def sample(self, index: int) -> Sample:
        row = self.rows[index]
        where = self.where(index, row.id)
        picture = self.picture(row, where)
        masks = self.masks(row, image_size(picture, where=where), where)
        answer = ANSWER_NOTHING if row.answer == ANSWER and masks == [None] else row.answer
        return Sample(row.id, self.turns(row.question, answer), [picture], self.name, dict(row.meta), masks)


class CocoInstancesSource(MaskSource):
    """Format ``coco_instances``: a row for every class of every picture of an instances json; its mask covers all instances of the class.
    Crowds (``iscrowd``) are neither taught nor counted, as COCO's own evaluation leaves them out; a class of crowds alone is no row."""

    what = "a COCO file of instances"

    def read(self) -> Iterator[Asked]:
        found = json.loads(self.path.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in found["categories"]}
        pictures = {entry["id"]: str(entry["file_name"]) for entry in found["images"]}
        of_class: dict[tuple[Any, Any], list[Any]] = {}
        for entry in found["annotations"]:
            of_class.setdefault((entry["image_id"], entry["category_id"]), []).append(entry)
        for (picture, category), entries in sorted(of_class.items()):
            if any(not entry.get("iscrowd") for entry in entries):
                parts = [(entry["segmentation"], bool(entry.get("iscrowd"))) for entry in entries]
                yield Asked(f"{picture}#{category}", pictures[picture], names[category], ANSWER, parts)

    def masks(self, row: Asked, size: tuple[int, int], where: str) -> list[Any]:
        found = np.zeros(size, np.uint8)
        for part, crowd in sorted(
            row.entry, key=lambda pair: not pair[1]
        ):  # crowds first: an instance inside one counts
            mask = read_mask({"polygons": part} if isinstance(part, list) else part, size, where=where)
            found[mask == 1] = IGNORE_PIXEL if crowd else 1
        return [{"values": found}]


class ReasonSegSource(MaskSource):
    """Format ``reasonseg``: a row for every text of ``x.json`` beside ``x.jpg`` in a folder. A text that is no sentence is asked for as
    LISA does, "What is … in this image?". Shapes labelled ``ignore`` do not count."""

    what = "a folder of ReasonSeg (x.json beside x.jpg)"

    def read(self) -> Iterator[Asked]:
        for file in sorted(self.path.glob("*.json")):
            found = json.loads(file.read_bytes().decode("utf-8", errors="replace"))
            for number, text in enumerate(found["text"]):
                whole = bool(found["is_sentence"])
                question = text if whole else f"What is {text} in this image?"
                shapes = {"shapes": [{"label": s["label"], "points": s["points"]} for s in found["shapes"]]}
                yield Asked(
                    f"{file.stem}#{number}", f"{file.stem}.jpg", question, ANSWER, shapes, {"is_sentence": whole}
                )

    def masks(self, row: Asked, size: tuple[int, int], where: str) -> list[Any]:
        found = reasonseg_mask(row.entry, size)
        return [{"values": found}] if found.any() else [None]

    @cached_property
    def fingerprint(self) -> str:
        return file_hash(sorted(self.path.glob("*.json")))


class MuseSource(MaskSource):
    """Format ``muse``: a row for every question of ``MUSE_….json`` (PixelLM): the answer is the set's own text where it has one, else names
    what it marks, with a ``[SEG]`` for each. ``image_root`` holds COCO's folders (train2014, train2017, val2017)."""

    what = "a file of MUSE"

    def read(self) -> Iterator[Asked]:
        for number, item in enumerate(json.loads(self.path.read_text(encoding="utf-8"))):
            if item.get("file_name"):
                picture = f"train2014/{Path(item['file_name']).name}"
            else:
                picture = "/".join(str(item["coco_url"]).split("/")[-2:])
            questions, answers = item.get("questions") or [], item.get("answers") or []
            texts = item.get("text_answers") or [None] * len(questions)
            for turn, (question, targets, text) in enumerate(zip(questions, answers, texts, strict=True)):
                if targets:
                    parts = [target["segmentation"] for target in targets]
                    yield Asked(f"{number}#{turn}", picture, question, _said(targets, text), parts)

    def masks(self, row: Asked, size: tuple[int, int], where: str) -> list[Any]:
        return [{"polygons": part} if isinstance(part, list) else part for part in row.entry]


def _said(targets: Sequence[Mapping[str, Any]], text: str | None) -> str:
    """MUSE's answer, ``{seg}`` being a mask; names and masks where it has none, or one that marks another number of things."""
    if text is not None and text.count("{seg}") == len(targets):
        return text.replace("{seg}", "[SEG]")
    named = [f"{target.get('rephrased_name') or target['category_name']} [SEG]" for target in targets]
    return f"{', '.join(named[:-1])} and {named[-1]}." if len(named) > 1 else f"{named[0]}."


class NnUnetSource(MaskSource):
    """Format ``nnunet``: a row for every case and label of a folder in nnU-Net's layout (``dataset.json``, ``imagesTr/CASE_0000.png``,
    ``labelsTr/CASE.png``), background left out. A label that a case does not show is answered with an empty mask; pixels labelled
    ``ignore`` do not count; a label that is a list of values (a region) is their union. ``split``: train (…Tr) or test (…Ts). One to three
    channels; only pictures, no volumes."""

    what = "a folder in nnU-Net's layout (dataset.json, imagesTr, labelsTr)"

    def read(self) -> Iterator[Asked]:
        described = json.loads((self.path / "dataset.json").read_text(encoding="utf-8"))
        ending, labels = str(described["file_ending"]), dict(described["labels"])
        channels, half = len(described["channel_names"]), {"train": "Tr", "test": "Ts"}.get(self.spec.split)
        where = f"dataset {self.spec.name}"
        if half is None:
            raise ConfigError(f"{where}: split: {self.spec.split!r}; expected train (imagesTr) or test (imagesTs)")
        if ending.lower() not in (".png", ".tif", ".tiff", ".bmp"):
            raise DataError(
                f"{where}: file_ending {ending}: these are volumes; only pictures are read (.png, .tif, .bmp). Write their slices as "
                "such first"
            )
        ignored = labels.pop("ignore", None)
        wanted = {name: [value] if isinstance(value, int) else list(value) for name, value in labels.items()}
        for file in sorted((self.path / f"labels{half}").glob(f"*{ending}")):
            case = file.name.removesuffix(ending)
            found = [self.path / f"images{half}/{case}_{channel:04d}{ending}" for channel in range(channels)]
            there = tuple(
                str(one) for one in found if one.exists()
            )  # all channels of a natural picture lie in one file
            if not there or len(there) > 3:
                raise DataError(
                    f"{where}: case {case} has {len(there)} files {found[0].name} … of {channels} channels; expected one to three"
                )
            for name, values in wanted.items():
                if values != [0]:
                    yield Asked(
                        f"{case}#{name}", there, name.replace("_", " "), ANSWER, (str(file), tuple(values), ignored)
                    )

    def picture(self, row: Asked, where: str) -> Any:
        if len(row.picture) == 1:
            return row.picture[0]
        channels = [np.asarray(Image.open(file)) for file in row.picture]
        if any(one.ndim != 2 or one.shape != channels[0].shape or one.dtype != np.uint8 for one in channels):
            shapes = ", ".join(f"{one.shape} of {one.dtype}" for one in channels)
            raise DataError(
                f"{where}: its channels are {shapes}; expected pictures of one size, of 8 bits and one channel each"
            )
        return Image.fromarray(np.stack([*channels, *[np.zeros_like(channels[0])] * (3 - len(channels))], axis=-1))

    def masks(self, row: Asked, size: tuple[int, int], where: str) -> list[Any]:
        file, values, ignored = row.entry
        label = np.asarray(Image.open(file))
        if label.shape != size:
            raise DataError(
                f"{where}: {file} has shape {label.shape}, its picture {size}; a label has its picture's size"
            )
        found = np.isin(label, values).astype(np.uint8)
        if ignored is not None:
            found[label == ignored] = IGNORE_PIXEL
        return [{"values": found}] if found.any() else [None]

    @cached_property
    def fingerprint(self) -> str:
        files = sorted({row.entry[0] for row in self.rows})
        listed = "".join(f"{Path(file).name} {Path(file).stat().st_size}\n" for file in files)
        return hashlib.sha256((file_hash([self.path / "dataset.json"]) + listed).encode()).hexdigest()
