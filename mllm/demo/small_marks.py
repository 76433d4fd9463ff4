"""What does the tiles demo learn from? Large charts with a small hatched mark on every bar, and the question how it is hatched.

A mark is 10 pixels wide in a picture of 448. All hatchings have the same period of four pixels and the same share of ink, and come in two
opposite phases: at 112 pixels each is a gray blot like every other. They are drawn at random, whatever a bar's height and colour.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from mllm.demo.charts_and_digits import learn_bpe

COLOURS = {
    "red": (255, 150, 150),
    "green": (150, 230, 150),
    "blue": (150, 180, 255),
    "yellow": (255, 235, 120),
    "purple": (220, 160, 255),
    "gray": (200, 200, 200),
}
HATCHINGS = ("across", "upright", "rising", "falling", "checked")
SIZE, BARS, UNIT, MARK = 448, 4, 28, 10
"""Pixels of the picture's sides; bars; pixels of one step of the axis; pixels of a mark's side."""
QUESTION = "How is the mark on the {colour} bar hatched?"


def prepare_small_marks(output_dir: Path | str, *, num_train: int = 2000, num_test: int = 300, seed: int = 0) -> Path:
    """Write ``train.jsonl`` (messages: every bar of a chart is asked for), ``test.jsonl`` (one question a chart) and the charts.

    Args:
        output_dir: a folder, made where it is missing.
        num_train: training charts.
        num_test: held-out charts.
        seed: of all that is drawn.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    (root / "charts").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", num_train), ("test", num_test)):
        rows = []
        for number in range(count):
            colours = rng.sample(sorted(COLOURS), BARS)
            marks = [rng.choice(HATCHINGS) for _ in colours]
            name = f"charts/{split}-{number:05d}.png"
            draw_chart(colours, marks, rng).save(root / name)
            asked = [(QUESTION.format(colour=colours[bar]), marks[bar]) for bar in rng.sample(range(BARS), BARS)]
            rows.append(_row(f"{split}-{number}", name, asked))
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def _row(identity: str, chart: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
    """A conversation about one chart; ``question`` and ``answer`` of its first pair beside it, for evaluation."""
    messages: list[dict[str, object]] = []
    for question, answer in pairs:
        image = [{"type": "image", "image": chart}, {"type": "text", "text": "\n" + question}]
        messages.append({"role": "user", "content": question if messages else image})
        messages.append({"role": "assistant", "content": answer})
    return {"id": identity, "image": chart, "question": pairs[0][0], "answer": pairs[0][1], "messages": messages}


def draw_chart(colours: list[str], marks: list[str], rng: random.Random) -> Image.Image:
    """A bar chart, each bar with its mark below its top.

    Args:
        colours: of the bars, from left to right.
        marks: their hatchings.
        rng: draws heights, shades, ink and phases.

    Returns:
        RGB, `SIZE` pixels on a side.
    """
    pixels = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    pixels[UNIT :: 2 * UNIT] = 215
    pitch = SIZE // len(colours)
    for place, (colour, mark) in enumerate(zip(colours, marks, strict=True)):
        left, top = place * pitch + UNIT // 2, UNIT * rng.randint(0, SIZE // UNIT - 3)
        pixels[top:, left : left + 3 * UNIT] = [value - rng.randint(20, 45) for value in COLOURS[colour]]
        row, column = top + UNIT + 9, left + UNIT // 2 + UNIT + 9
        pixels[row : row + MARK, column : column + MARK][hatching(mark, rng.choice((0, 2)))] = rng.randint(40, 110)
    return Image.fromarray(pixels)


def hatching(mark: str, phase: int = 0) -> np.ndarray:
    """Where a mark has ink, ``(MARK, MARK)``; phase: pixels by which it is moved."""
    y, x = np.mgrid[:MARK, :MARK]
    if mark == "checked":
        return ((x + phase) // 2 + y // 2) % 2 == 0
    return {"across": y, "upright": x, "rising": x + y, "falling": x - y}[mark] % 4 // 2 == phase // 2


def train_small_marks_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words.

    Args:
        output_dir: where it is saved.

    Returns:
        The folder.
    """
    lines = [f"user\n{QUESTION.format(colour=colour)}\nassistant\n{mark}\n" for colour in COLOURS for mark in HATCHINGS]
    learn_bpe(lines * 20, 384, template="chatml", max_length=1024).save_pretrained(str(output_dir))
    return Path(output_dir)
