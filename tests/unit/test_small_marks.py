"""Are the tiles demo's marks told apart in the chart, and alike at 112 pixels?"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.demo.small_marks import (
    COLOURS,
    HATCHINGS,
    MARK,
    PITCH,
    QUESTION,
    REQUEST,
    SIZE,
    draw_chart,
    hatching,
    prepare_small_marks,
    put_mark,
)


def test_marks_differ_and_have_equal_ink_in_every_block_that_becomes_one_pixel() -> None:
    marks = {name: hatching(name) for name in HATCHINGS}
    assert len({mark.tobytes() for mark in marks.values()}) == len(marks), "two hatchings are one"
    for name, mark in marks.items():
        assert mark.shape == (MARK, MARK)
        for top in range(MARK - 3):
            for left in range(MARK - 3):
                assert mark[top : top + 4, left : left + 4].sum() == 8, (name, top, left)


@pytest.mark.parametrize("ink", [0, 60])
@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_at_112_pixels_all_hatchings_are_one_blot(colour: str, ink: int) -> None:
    """No pixel of any two differs by more than what rounding to whole gray levels makes; in the chart they differ by 195 and more."""

    def seen(mark: str) -> np.ndarray:
        pixels = np.full((2 * PITCH, 2 * PITCH, 3), [value - 30 for value in COLOURS[colour]], dtype=np.uint8)
        put_mark(pixels[86 : 86 + MARK, 86 : 86 + MARK], mark, ink)
        return pixels

    large = np.stack([seen(mark) for mark in HATCHINGS]).astype(int)
    quarter = (PITCH // 2, PITCH // 2)
    small = np.stack([Image.fromarray(seen(mark)).resize(quarter, Image.Resampling.BICUBIC) for mark in HATCHINGS])
    assert np.ptp(small.astype(int), axis=0).max() <= 2
    assert min(abs(a - b).max() for a, b in pairwise(large)) >= 195


def test_charts_and_conversations_agree(tmp_path: Path) -> None:
    prepare_small_marks(tmp_path, num_train=3, num_test=2, num_close_ups=5)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert {name: len(found) for name, found in rows.items()} == {"train": 3, "captions": 3, "test": 2, "close_ups": 5}
    for name, found in rows.items():
        side, turns = (PITCH, 1) if name == "close_ups" else (SIZE, 1 if name == "captions" else 4)
        for row in found:
            assert Image.open(tmp_path / row["image"]).size == (side, side)
            said = row["messages"]
            assert [message["role"] for message in said] == ["user", "assistant"] * turns
            assert said[0]["content"][1]["text"].strip() == row["question"] and said[1]["content"] == row["answer"]
    assert {row["question"] for row in rows["train"]} <= {QUESTION.format(colour=colour) for colour in COLOURS}
    for caption, row in zip(rows["captions"], rows["train"], strict=True):
        assert caption["image"] == row["image"] and caption["question"] == REQUEST
        readings = caption["answer"].split(", ")
        answers = [message["content"] for message in row["messages"][1::2]]
        assert sorted(answers) == sorted(readings)
        assert _asked(row) == [QUESTION.format(colour=answer.split()[0]) for answer in answers]


def _asked(row: dict) -> list[str]:
    first, *others = row["messages"][::2]
    return [first["content"][1]["text"].strip(), *(message["content"] for message in others)]


def test_the_held_out_charts_do_not_depend_on_how_many_are_learned_from(tmp_path: Path) -> None:
    few, many = (prepare_small_marks(tmp_path / str(n), num_train=n, num_test=2, num_close_ups=n) for n in (1, 2))
    assert (few / "test.jsonl").read_text() == (many / "test.jsonl").read_text()
    assert (few / "charts/test-00001.png").read_bytes() == (many / "charts/test-00001.png").read_bytes()
    drawn = [
        np.asarray(draw_chart(["red", "blue", "gray", "green"], ["across"] * 4, random.Random(k))) for k in (1, 1, 2)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
