"""Are RefCOCO's official files trained on with the masks that their authors' tools draw, and refused where they do not fit?"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.data.refer import ReferSource
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.processing.chat import encode_sample
from mllm.processing.mask_files import decode_rle, encode_rle, read_mask
from mllm.types import IMAGE_MARK
from tests.helpers import tiny_model

GOLDEN = json.loads((Path(__file__).with_name("coco_polygons.json")).read_text())["cases"]
SQUARE = [[4, 2, 12, 2, 12, 8, 4, 8]]
HOLED = np.zeros((10, 20), np.uint8)
HOLED[1:9, 1:9], HOLED[3:5, 3:5] = 1, 0


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_polygons_cover_what_cocos_own_code_says(number: int) -> None:
    case = GOLDEN[number]
    mask = read_mask({"polygons": case["polygons"]}, tuple(case["size"]), where="m")
    assert np.array_equal(mask, decode_rle(case))


def files(folder: Path, **changes: Any) -> Path:
    """Two references of one picture: a square, and a thing with a hole as plain run lengths."""
    counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(HOLED.ravel(order="F"))) + 1, [HOLED.size]])).tolist()
    annotations = [
        {"id": 11, "image_id": 5, "bbox": [4, 2, 8, 6], "segmentation": SQUARE},
        {"id": 12, "image_id": 5, "bbox": [1, 1, 8, 8], "segmentation": {"size": [10, 20], "counts": counts}},
    ]
    annotations[0] |= changes
    images = [{"id": 5, "file_name": "five.png"}]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    references = [
        {
            "ref_id": ref,
            "ann_id": ann,
            "image_id": 5,
            "split": split,
            "sentences": [{"sent": text} for text in texts],
        }
        for ref, ann, split, texts in ((3, 11, "train", ["left cup", "cup"]), (4, 12, "val", [f"{IMAGE_MARK} frame"]))
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=0))
    Image.new("RGB", (20, 10), (90, 20, 20)).save(folder / "five.png")
    return folder / "refs(unc).p"


def spec(path: Path, **changes: Any) -> DatasetSpec:
    given = {"name": "r", "format": "refer", "path": str(path), "prompt": "Please segment {question}."}
    return DatasetSpec(**{**given, **changes})


def test_each_sentence_is_asked_for_and_answers_with_its_mask(tmp_path: Path) -> None:
    source = open_source(spec(files(tmp_path)))
    assert isinstance(source, ReferSource) and len(source) == 2
    first = source[0]
    assert first.id == "3#0" and first.images == [str(tmp_path / "five.png")]
    assert [turn.content for turn in first.turns] == [f"{IMAGE_MARK}\nPlease segment left cup.", "It is [SEG]."]
    mask = read_mask(first.masks[0], (10, 20), where="m")
    assert mask[2:8, 4:12].all() and mask.sum() == 48  # COCO's area: no outline is added
    other = open_source(spec(tmp_path / "refs(unc).p", split="val"))[0]
    assert np.array_equal(read_mask(other.masks[0], (10, 20), where="m"), HOLED)
    assert encode_rle(HOLED)["size"] == [10, 20] and other.turns[0].content.count(IMAGE_MARK) == 1
    assert source.fingerprint == open_source(spec(tmp_path / "refs(unc).p")).fingerprint
    assert source.quarantine_path() != open_source(spec(tmp_path / "refs(unc).p", split="val")).quarantine_path()
    head = {"type": "segmentation", "encoder": "semantic", "decoder": {"type": "query", "width": 16, "heads": 2}}
    _, processor = tiny_model(tmp_path / "model", heads={"marks": head})
    masks = encode_sample(processor, first).masks
    assert masks is not None and masks.shape[0] == 1 and masks.any()


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = files(tmp_path, segmentation=[])
    with pytest.raises(DataError, match=r"r, sample '3#0' \(row 0\): its annotation in instances.json has no segment"):
        open_source(spec(path))[0]
    with pytest.raises(DataError, match=r"holds no split 'testA'; its splits: train, val"):
        open_source(spec(path, split="testA"))
    with pytest.raises(ConfigError, match="no place for the sentence"):
        open_source(spec(path, prompt="Segment it."))
    with pytest.raises(ConfigError, match="give path, and neither hub nor streaming"):
        open_source(DatasetSpec(name="r", format="refer", hub="a/b", prompt="{question}"))
    with pytest.raises(DataError, match=r"no file .*absent\.p\. It comes from: here"):
        open_source(spec(tmp_path / "absent.p", download=["here"]))
