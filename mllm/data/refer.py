"""How are the official files of RefCOCO, RefCOCO+ and RefCOCOg read, to test and to train, without running what a pickle may hold?"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm.data.files import file_hash
from mllm.data.sources import Source, resolve_image
from mllm.data.spec import DatasetSpec, expand_path
from mllm.errors import ConfigError, DataError
from mllm.types import IMAGE_MARK, Sample, Turn

ANSWER = "It is [SEG]."
"""What is learned beside the mask; LISA's first answer."""


class _PlainData(pickle.Unpickler):
    """Lists, mappings, numbers and text only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; expected plain lists and mappings")


def refer_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One row a sentence of a ``refs(…).p`` file, with the box of ``instances.json`` beside it: ``ref_id number sentence
    bbox (x, y, width, height in pixels) mask file_name split``; the mask as `read_mask` takes it, None where the annotation has none.
    Raises `DataError` naming the file and the reference."""
    boxes_path = path.with_name("instances.json")
    try:
        with path.open("rb") as handle:
            references = _PlainData(handle, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: not readable as references ({type(error).__name__}: {error})") from None
    try:
        instances = json.loads(boxes_path.read_text(encoding="utf-8"))
        boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
        masks = {entry["id"]: _mask(entry.get("segmentation")) for entry in instances["annotations"]}
        names = {entry["id"]: entry["file_name"] for entry in instances["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{boxes_path}: no COCO annotations with boxes ({type(error).__name__}: {error})") from None
    for reference in references:
        try:
            common = {
                "ref_id": reference["ref_id"], "split": reference["split"], "bbox": boxes.get(reference["ann_id"]),
                "mask": masks.get(reference["ann_id"]), "file_name": names.get(reference["image_id"]),
            }  # fmt: skip
            sentences = [entry["sent"] for entry in reference["sentences"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a reference is incomplete ({type(error).__name__}: {error})") from None
        if common["bbox"] is None or common["file_name"] is None:
            raise DataError(f"{path}: reference {common['ref_id']} has no box or picture in {boxes_path.name}")
        for number, sentence in enumerate(sentences):
            yield common | {"number": number, "sentence": sentence}


def _mask(segmentation: Any) -> Any:
    """COCO's ``segmentation`` as `read_mask` takes it; None: there is none."""
    return {"polygons": segmentation} if isinstance(segmentation, list) and segmentation else segmentation or None


class ReferSource(Source):
    """Format ``refer``: one sample a sentence of a ``refs(…).p`` file, whose mask is learned. ``split``: its own names (train, val, testA
    …); ``image_root``: where COCO's pictures lie; ``prompt``: what the user says, with the sentence as ``{question}``."""

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        where = f"dataset {spec.name}"
        if spec.path is None or spec.streaming:
            raise ConfigError(f"{where}: format refer reads a file refs(…).p; give path, and neither hub nor streaming")
        if "{question}" not in spec.prompt:
            raise ConfigError(
                f"{where}: prompt: {spec.prompt!r} has no place for the sentence; write {{question}} there"
            )
        self.path = expand_path(spec.path, where=where)
        if not self.path.is_file():
            hint = f". It comes from: {' ; '.join(spec.download)}" if spec.download else ""
            raise DataError(f"{where}: no file {self.path}{hint}")
        self.root = expand_path(spec.image_root, where=where) if spec.image_root else self.path.parent
        found = list(refer_rows(self.path))
        self.rows = [row for row in found if row["split"] == spec.split]
        if not self.rows:
            splits = ", ".join(sorted({str(row["split"]) for row in found})) or "none"
            raise DataError(f"{where}: {self.path} holds no split {spec.split!r}; its splits: {splits}")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        return file_hash([self.path, self.path.with_name("instances.json")])

    def quarantine_path(self) -> Path:
        if self.spec.quarantine:
            return super().quarantine_path()
        return self.path.with_name(f"{self.path.name}.{self.spec.split}.quarantine.jsonl")

    def sample(self, index: int) -> Sample:
        row = self.rows[index]
        identity = f"{row['ref_id']}#{row['number']}"
        where = self.where(index, identity)
        if row["mask"] is None:
            raise DataError(f"{where}: its annotation in instances.json has no segmentation")
        request = self.spec.prompt.replace("{question}", row["sentence"].replace(IMAGE_MARK, "").strip())
        turns = [Turn("user", f"{IMAGE_MARK}\n{request}"), Turn("assistant", ANSWER)]
        picture = resolve_image(str(row["file_name"]), self.root, where)
        return Sample(identity, turns, [picture], self.name, {"split": row["split"]}, [row["mask"]])
