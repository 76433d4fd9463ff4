"""Are the tiles demo's marks told apart in the chart, and alike at 112 pixels?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from mllm.demo.small_marks import COLOURS, HATCHINGS, MARK, QUESTION, SIZE, draw_chart, hatching, prepare_small_marks


def test_marks_differ_and_have_equal_ink_in_every_block_that_becomes_one_pixel() -> None:
    marks = {(name, phase): hatching(name, phase) for name in HATCHINGS for phase in (0, 2)}
    assert len({mark.tobytes() for mark in marks.values()}) == len(marks), "two hatchings are one"
    for (name, phase), mark in marks.items():
        assert mark.shape == (MARK, MARK)
        for top in range(MARK - 3):
            for left in range(MARK - 3):
                assert mark[top : top + 4, left : left + 4].sum() == 8, (name, phase, top, left)
        assert np.array_equal(mark, ~hatching(name, 2 - phase)), (
            "the phases are not opposite: their mean would tell them"
        )


def test_at_112_pixels_hatchings_differ_less_than_their_own_phases_do() -> None:
    """What is left at a mark's edge depends on the phase more than on the hatching."""

    def blot(mark: str, phase: int) -> np.ndarray:
        pixels = np.full((40, 40), 180, dtype=np.uint8)
        pixels[9 : 9 + MARK, 9 : 9 + MARK][hatching(mark, phase)] = 70
        return np.asarray(Image.fromarray(pixels).resize((10, 10), Image.Resampling.BICUBIC), dtype=float)

    means = {name: (blot(name, 0) + blot(name, 2)) / 2 for name in HATCHINGS}
    apart = max(float(abs(a - b).max()) for a in means.values() for b in means.values())
    assert apart <= 1.0, f"{apart} gray levels between two hatchings, phases averaged"


def test_charts_and_conversations_agree(tmp_path: Path) -> None:
    prepare_small_marks(tmp_path, num_train=3, num_test=2)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and len((tmp_path / "test.jsonl").read_text().splitlines()) == 2
    for row in rows:
        assert Image.open(tmp_path / row["image"]).size == (SIZE, SIZE)
        said = row["messages"]
        assert [message["role"] for message in said] == ["user", "assistant"] * 4
        assert said[0]["content"][1]["text"].strip() == row["question"] and said[1]["content"] == row["answer"]
    assert {row["question"] for row in rows} <= {QUESTION.format(colour=colour) for colour in COLOURS}
    drawn = [
        np.asarray(draw_chart(["red", "blue", "gray", "green"], ["across"] * 4, random.Random(k))) for k in (1, 1, 2)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
