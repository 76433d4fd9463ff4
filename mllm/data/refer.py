"""How are the official files of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO read, to test and to train, without running what a pickle
may hold?"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.files import file_hash
from mllm.data.mask_rows import ANSWER, ANSWER_NOTHING, MaskRows
from mllm.data.sources import resolve_image
from mllm.data.spec import DatasetSpec
from mllm.errors import DataError
from mllm.processing.mask_files import encode_rle, read_mask
from mllm.types import Sample

NOTHING: dict[str, Any] = {"polygons": []}
"""The mask of a sentence that names nothing, as `read_mask` takes it."""


class _PlainData(pickle.Unpickler):
    """Lists, mappings, numbers and text only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; expected plain lists and mappings")


def refer_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One row a sentence of a ``refs(…).p`` or ``grefs(…).json`` file, with the box of ``instances.json`` beside it: ``ref_id number
    sentence bbox (x, y, width, height in pixels) mask file_name split no_target``; the mask as `read_mask` takes it, None where the
    annotation has none.

    gRefCOCO: a sentence names several annotations (its mask is their union, its box goes round them) or nothing (``no_target``: an
    empty mask, no box). Raises `DataError` naming the file and the reference."""
    boxes_path = path.with_name("instances.json")
    try:
        if path.suffix == ".json":
            references = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open("rb") as handle:
                references = _PlainData(handle, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: not readable as references ({type(error).__name__}: {error})") from None
    try:
        instances = json.loads(boxes_path.read_text(encoding="utf-8"))
        boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
        outlines = {entry["id"]: entry.get("segmentation") for entry in instances["annotations"]}
        names = {entry["id"]: entry["file_name"] for entry in instances["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{boxes_path}: no COCO annotations with boxes ({type(error).__name__}: {error})") from None
    for reference in references:
        try:
            named = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
            nothing = bool(reference.get("no_target")) or named == [-1]
            found = [] if nothing else named
            common = {
                "ref_id": reference["ref_id"], "split": reference["split"], "bbox": _around([boxes.get(one) for one in found]),
                "mask": NOTHING if nothing else _union([outlines.get(one) for one in found], f"{path}: {reference['ref_id']}"),
                "file_name": names.get(reference["image_id"]), "no_target": nothing,
            }  # fmt: skip
            sentences = [entry["sent"] for entry in reference["sentences"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a reference is incomplete ({type(error).__name__}: {error})") from None
        if (common["bbox"] is None and not nothing) or common["file_name"] is None:
            raise DataError(f"{path}: reference {common['ref_id']} has no box or picture in {boxes_path.name}")
        for number, sentence in enumerate(sentences):
            yield common | {"number": number, "sentence": sentence}


def _around(boxes: list[Any]) -> list[float] | None:
    """The box ``(x, y, width, height)`` round all of these; None without any, or where one is missing."""
    if not boxes or None in boxes:
        return None
    if len(boxes) == 1:
        return boxes[0]
    left, top = (min(box[k] for box in boxes) for k in (0, 1))
    right, bottom = (max(box[k] + box[k + 2] for box in boxes) for k in (0, 1))
    return [left, top, right - left, bottom - top]


def _union(segmentations: list[Any], where: str) -> Any:
    """COCO's ``segmentation`` of one or several annotations as `read_mask` takes it; None where one has none."""
    if not segmentations or not all(segmentations):
        return None
    if all(isinstance(one, list) for one in segmentations):
        return {"polygons": [ring for one in segmentations for ring in one]}
    if len(segmentations) == 1:
        return segmentations[0]
    size = next(tuple(one["size"]) for one in segmentations if not isinstance(one, list))
    parts = [{"polygons": one} if isinstance(one, list) else one for one in segmentations]
    return encode_rle(np.maximum.reduce([read_mask(part, size, where=where) for part in parts]))


class ReferSource(MaskRows):
    """Format ``refer``: one sample a sentence of a ``refs(…).p`` or ``grefs(…).json`` file, whose mask is learned, empty where it names
    nothing. ``split``: its own names (train, val, testA
    …); ``image_root``: where COCO's pictures lie; ``prompt``: what the user says, with the sentence as ``{question}``."""

    what, named, asked = "a file refs(…).p or grefs(…).json", "file", "the sentence"

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        where = f"dataset {spec.name}"
        found = list(refer_rows(self.path))
        self.rows = [row for row in found if row["split"] == spec.split]
        if not self.rows:
            splits = ", ".join(sorted({str(row["split"]) for row in found})) or "none"
            raise DataError(f"{where}: {self.path} holds no split {spec.split!r}; its splits: {splits}")

    def is_there(self) -> bool:
        return self.path.is_file()

    @cached_property
    def fingerprint(self) -> str:
        return file_hash([self.path, self.path.with_name("instances.json")])

    def sample(self, index: int) -> Sample:
        row = self.rows[index]
        identity = f"{row['ref_id']}#{row['number']}"
        where = self.where(index, identity)
        if row["mask"] is None:
            raise DataError(f"{where}: its annotation in instances.json has no segmentation")
        answer, mask = (ANSWER_NOTHING, None) if row["no_target"] else (ANSWER, row["mask"])
        picture = resolve_image(str(row["file_name"]), self.root, where)
        return Sample(
            identity, self.turns(row["sentence"], answer), [picture], self.name, {"split": row["split"]}, [mask]
        )
