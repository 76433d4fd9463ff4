"""Is a text with codes taken apart as ILLUME+ does it?"""

from __future__ import annotations

from pathlib import Path

import torch

from mllm.heads.codes.text import read_images
from tests.golden import fill

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_images_in_a_text_are_illumes():
    meta, _, outputs = fill.load(GOLDEN / "illume_parse_image_text.json")
    found = [read_images(text) for text in fill.texts(meta)]
    counts = torch.full(tuple(outputs["output.counts"].shape), -1)
    for row, one in enumerate(found):
        for place, levels in enumerate(one.images):
            counts[row, place] = torch.tensor([len(codes) for codes in levels])
    texts = torch.full(tuple(outputs["output.text"].shape), -1)
    for row, one in enumerate(found):
        texts[row, : len(one.text)] = torch.tensor([ord(letter) for letter in one.text])
    indices = [code for one in found for levels in one.images for codes in levels for code in codes]
    fill.check(meta, outputs, {"output.counts": counts, "output.text": texts, "output.indices": torch.tensor(indices)})


def test_further_levels_are_left_out_and_an_open_image_stays_text():
    opened = "<start_of_image><|image_level0_1|>"
    text = (
        "a<image_start><image_level0><|image_level0_7|><image_line></image_level0><|image_level2_1|><image_end>\n"
        + opened
    )
    read = read_images(text)
    assert read.images == [([7], [])] and read.text == "a<image>\n" + opened
    assert read_images(text, levels=3).images == [([7], [], [1])]
