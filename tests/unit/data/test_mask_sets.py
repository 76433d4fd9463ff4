"""Are COCO's instances, ReasonSeg, MUSE and nnU-Net's layout read as they are published, with what does not count left out?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.processing.chat import encode_sample
from mllm.processing.mask_files import encode_rle, read_mask
from mllm.types import IMAGE_MARK
from tests.helpers import tiny_model

SIZE = (10, 20)
SQUARE, LEFT = [[4, 2, 12, 2, 12, 8, 4, 8]], [[0, 0, 2, 0, 2, 10, 0, 10]]
CROWD = np.zeros(SIZE, np.uint8)
CROWD[:, 10:] = 1


def spec(form: str, path: Path, **changes: Any) -> DatasetSpec:
    return DatasetSpec(
        **{"name": "m", "format": form, "path": str(path), "prompt": "Please segment {question}.", **changes}
    )


def picture(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (90, 20, 20)).save(path)
    return str(path)


def read(sample: Any) -> list[np.ndarray]:
    return [read_mask(mask, SIZE, where="m") for mask in sample.masks]


def coco(folder: Path) -> Path:
    picture(folder / "five.png")
    pieces = [(1, SQUARE, 0), (1, encode_rle(CROWD), 1), (1, LEFT, 0), (2, encode_rle(CROWD), 1)]
    annotations = [
        {"id": k, "image_id": 5, "category_id": category, "segmentation": part, "iscrowd": crowd}
        for k, (category, part, crowd) in enumerate(pieces)
    ]
    names = [{"id": 1, "name": "cup"}, {"id": 2, "name": "person"}]
    file = folder / "instances.json"
    file.write_text(
        json.dumps({"images": [{"id": 5, "file_name": "five.png"}], "annotations": annotations, "categories": names})
    )
    return file


def test_cocos_classes_are_asked_for_with_crowds_left_out(tmp_path: Path) -> None:
    source = open_source(spec("coco_instances", coco(tmp_path)))
    assert len(source) == 1, "a class of crowds alone teaches nothing"
    sample = source[0]
    assert [turn.content for turn in sample.turns] == [f"{IMAGE_MARK}\nPlease segment cup.", "It is [SEG]."]
    (mask,) = read(sample)
    assert (mask[2:8, 4:12] == 1).all() and (mask[:, :2] == 1).all(), "an instance inside a crowd counts"
    assert (mask[:, 13:] == 255).all() and not mask[0, 3:9].any()
    head = {"type": "segmentation", "encoder": "semantic", "decoder": {"type": "query", "width": 16, "heads": 2}}
    _, processor = tiny_model(tmp_path / "model", heads={"marks": head})
    encoded = encode_sample(processor, sample)
    assert encoded.masks is not None and set(encoded.masks.unique().tolist()) == {0, 1, 255}


def test_every_text_of_reasonseg_is_asked_and_what_it_ignores_does_not_count(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    corner = [[15, 0], [19, 0], [19, 4], [15, 4]]
    shapes = [{"label": "target", "points": [[4, 2], [11, 2], [11, 7], [4, 7]]}, {"label": "ignore", "points": corner}]
    given = {"shapes": shapes, "text": ["what holds tea"], "is_sentence": False}
    (tmp_path / "a.json").write_text(json.dumps(given))
    picture(tmp_path / "b.jpg")
    (tmp_path / "b.json").write_text(
        json.dumps({"shapes": shapes[1:], "text": ["Where is it?", "Who?"], "is_sentence": True})
    )
    source = open_source(spec("reasonseg", tmp_path, prompt="{question} Please segment it."))
    assert [source[k].turns[0].content for k in range(3)] == [
        f"{IMAGE_MARK}\nWhat is what holds tea in this image? Please segment it.",
        f"{IMAGE_MARK}\nWhere is it? Please segment it.",
        f"{IMAGE_MARK}\nWho? Please segment it.",
    ]
    (mask,) = read(source[0])
    assert (mask[2:8, 4:12] == 1).all() and (mask[1:4, 16:19] == 255).all()
    (ignored,) = read(source[1])
    assert set(np.unique(ignored)) == {0, 255}, "nothing is there, and a part of the picture does not count"
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match="ReasonSeg"):
        open_source(spec("reasonseg", tmp_path))


def test_muses_answers_hold_a_mask_for_every_thing_they_name(tmp_path: Path) -> None:
    picture(tmp_path / "train2014/a.jpg")
    picture(tmp_path / "val2017/b.jpg")
    cup, edge = (
        {"segmentation": SQUARE, "category_name": "cup", "rephrased_name": "a tea cup"},
        {"segmentation": LEFT, "category_name": "edge"},
    )
    rows = [
        {"file_name": "a.jpg", "questions": ["What can hold tea?"], "answers": [[cup, edge]], "text_answers": ["The {seg} and {seg}."]},
        {"coco_url": "http://images.cocodataset.org/val2017/b.jpg", "questions": ["What is here?", "And?", "None?"],
         "answers": [[cup, edge], [edge], []]},
    ]  # fmt: skip
    (tmp_path / "MUSE_val.json").write_text(json.dumps(rows))
    source = open_source(spec("muse", tmp_path / "MUSE_val.json", prompt="{question}"))
    assert [source[k].turns[1].content for k in range(len(source))] == [
        "The [SEG] and [SEG].",
        "a tea cup [SEG] and edge [SEG].",
        "edge [SEG].",
    ]
    first, second = read(source[0])
    assert first[2:8, 4:12].all() and first.sum() == 48 and second[:, :2].all() and second.sum() == 20
    assert source[1].images == [str(tmp_path / "val2017/b.jpg")]


def nnunet(folder: Path, **labels: Any) -> Path:
    described = {"channel_names": {"0": "R", "1": "G"}, "labels": labels, "numTraining": 2, "file_ending": ".png"}
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "imagesTr").mkdir()
    (folder / "dataset.json").write_text(json.dumps(described))
    for number, case in enumerate(("one", "two")):
        for channel in range(2):
            Image.fromarray(np.full(SIZE, 40 * channel + number, np.uint8)).save(
                folder / f"imagesTr/{case}_{channel:04d}.png"
            )
        label = np.zeros(SIZE, np.uint8)
        label[2:5], label[5:7] = 1, 2 if number else 0
        label[:, 18:] = 3
        Image.fromarray(label).save(folder / f"labelsTr/{case}.png")
    return folder


def test_nnunets_labels_are_asked_for_case_by_case(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "a", background=0, cell_wall=1, core=2, both=[1, 2])
    source = open_source(spec("nnunet", folder))
    assert [source[k].id for k in range(6)] == [
        "one#cell_wall",
        "one#core",
        "one#both",
        "two#cell_wall",
        "two#core",
        "two#both",
    ]
    wall, core, both = (source[k] for k in range(3))
    assert wall.turns[0].content.endswith("Please segment cell wall.") and read(wall)[0].sum() == 3 * 18
    assert core.masks == [None] and core.turns[1].content == "It is [SEG]: none."
    assert np.array_equal(read(both)[0], read(wall)[0]) and read(source[5])[0].sum() == 5 * 18
    assert np.asarray(wall.images[0])[0, 0].tolist() == [0, 40, 0], "channels lie in their order"
    ignoring = open_source(spec("nnunet", nnunet(tmp_path / "b", background=0, core=2, ignore=3)))
    assert set(np.unique(read(ignoring[0])[0])) == {0, 255} and set(np.unique(read(ignoring[1])[0])) == {0, 1, 255}
    assert source.fingerprint == open_source(spec("nnunet", folder)).fingerprint != ignoring.fingerprint
    for changes, told in (({"split": "val"}, "imagesTr"), ({"prompt": "mark it"}, "{question}")):
        with pytest.raises(ConfigError, match=told):
            open_source(spec("nnunet", folder, **changes))
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"a": 1}, "file_ending": ".nii.gz"})
    )
    with pytest.raises(DataError, match="volumes"):
        open_source(spec("nnunet", folder))
    with pytest.raises(DataError, match="is not a folder in nnU-Net's layout"):
        open_source(spec("nnunet", tmp_path))
