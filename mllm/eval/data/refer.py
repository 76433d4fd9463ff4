"""How are the official files of RefCOCO, RefCOCO+ and RefCOCOg read without running what a pickle may hold?"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.errors import DataError


class _PlainData(pickle.Unpickler):
    """Lists, mappings, numbers and text only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; expected plain lists and mappings")


def refer_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One row a sentence of a ``refs(…).p`` file, with the box of ``instances.json`` beside it: ``ref_id number sentence
    bbox (x, y, width, height in pixels) file_name split``. Raises `DataError` naming the file and the reference."""
    boxes_path = path.with_name("instances.json")
    try:
        with path.open("rb") as handle:
            references = _PlainData(handle, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: not readable as references ({type(error).__name__}: {error})") from None
    try:
        instances = json.loads(boxes_path.read_text(encoding="utf-8"))
        boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
        names = {entry["id"]: entry["file_name"] for entry in instances["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{boxes_path}: no COCO annotations with boxes ({type(error).__name__}: {error})") from None
    for reference in references:
        try:
            common = {
                "ref_id": reference["ref_id"], "split": reference["split"], "bbox": boxes.get(reference["ann_id"]),
                "file_name": names.get(reference["image_id"]),
            }  # fmt: skip
            sentences = [entry["sent"] for entry in reference["sentences"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a reference is incomplete ({type(error).__name__}: {error})") from None
        if common["bbox"] is None or common["file_name"] is None:
            raise DataError(f"{path}: reference {common['ref_id']} has no box or picture in {boxes_path.name}")
        for number, sentence in enumerate(sentences):
            yield common | {"number": number, "sentence": sentence}
