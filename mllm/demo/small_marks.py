"""What does the tiles demo learn from? Large charts with a small hatched mark on every bar, and the question how it is hatched.

A mark is 24 pixels wide in a picture of 448. All hatchings have the same period of four pixels and the same share of ink, and fade
out at the mark's edge: at 112 pixels each is the same gray blot, whatever its hatching. They are drawn at random, whatever a bar's
height and colour. From easy to hard: close-ups (one bar, 112 pixels), whole charts read from left to right, questions about one bar,
which are answered as the charts are read: by the bar's colour and its hatching.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from mllm.data.conversations import picture_messages
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
SIZE, BARS, UNIT, MARK, FADE = 448, 4, 28, 24, 8
"""Pixels of the picture's sides; bars; pixels of one step of the axis, of a mark's side, and of the edge in which it fades."""
PITCH = SIZE // BARS
"""Pixels from bar to bar, and of a close-up's sides."""
QUESTION = "Read the mark on the {colour} bar."
REQUEST = "Read every mark."


def prepare_small_marks(
    output_dir: Path | str, *, num_train: int = 2000, num_test: int = 300, num_close_ups: int = 4000, seed: int = 0
) -> Path:
    """Write rows of messages with their pictures: ``close_ups.jsonl`` (one bar, read), ``captions.jsonl`` (every bar of a chart
    read), ``train.jsonl`` (every bar of the same charts asked for) and ``test.jsonl`` (one question about each of other charts).

    Args:
        output_dir: a folder, made where it is missing.
        num_train: training charts.
        num_test: held-out charts, which the other numbers do not change.
        num_close_ups: pictures of one bar.
        seed: of all that is drawn.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    (root / "charts").mkdir(parents=True, exist_ok=True)
    captions, rows = [], {}
    for split, count, bars in (("close-up", num_close_ups, 1), ("train", num_train, BARS), ("test", num_test, BARS)):
        rng = random.Random(f"{seed} {split}")
        rows[split] = []
        for number in range(count):
            colours = rng.sample(sorted(COLOURS), bars)
            marks = [rng.choice(HATCHINGS) for _ in colours]
            name = f"charts/{split}-{number:05d}.png"
            draw_chart(colours, marks, rng, size=bars * PITCH).save(root / name)
            reading = [f"{colour} {mark}" for colour, mark in zip(colours, marks, strict=True)]
            read = (REQUEST, ", ".join(reading))
            asked = [(QUESTION.format(colour=colours[bar]), reading[bar]) for bar in rng.sample(range(bars), bars)]
            rows[split].append(_row(f"{split}-{number}", name, [read] if split == "close-up" else asked))
            if split == "train":
                captions.append(_row(f"caption-{number}", name, [read]))
    files = {"close_ups": rows["close-up"], "captions": captions, "train": rows["train"], "test": rows["test"]}
    for name, written in files.items():
        text = "".join(json.dumps(row) + "\n" for row in written)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return root


def _row(identity: str, chart: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
    """A conversation about one chart; ``question`` and ``answer`` of its first pair beside it, for evaluation."""
    (question, answer), *_ = pairs
    messages = picture_messages(chart, pairs)
    return {"id": identity, "image": chart, "question": question, "answer": answer, "messages": messages}


def draw_chart(colours: list[str], marks: list[str], rng: random.Random, *, size: int = SIZE) -> Image.Image:
    """A bar chart, each bar with its mark below its top.

    Args:
        colours: of the bars, from left to right.
        marks: their hatchings.
        rng: draws heights, shades and ink.
        size: pixels of the picture's sides.

    Returns:
        RGB, ``size`` pixels on a side.
    """
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    pixels[UNIT :: 2 * UNIT] = 215
    pitch, inset = size // len(colours), (UNIT - MARK) // 2
    for place, (colour, mark) in enumerate(zip(colours, marks, strict=True)):
        left, top = place * pitch + UNIT // 2, UNIT * rng.randint(0, size // UNIT - 2)
        pixels[top:, left : left + 3 * UNIT] = [value - rng.randint(20, 45) for value in COLOURS[colour]]
        row, column = top + UNIT + inset, left + UNIT // 2 + UNIT + inset
        put_mark(pixels[row : row + MARK, column : column + MARK], mark, rng.randint(0, 60))
    return Image.fromarray(pixels)


def put_mark(pixels: np.ndarray, mark: str, ink: int) -> None:
    """Draw ink on white paper over ``pixels`` ``(MARK, MARK, 3)``, in place; towards the edge these show through.

    The fading is what hides a hatching at 112 pixels: a mark that ended at once would be told by the lines at its edge.
    """
    steps = np.minimum(np.arange(MARK) + 0.5, MARK - 0.5 - np.arange(MARK)) / FADE
    share = np.outer(steps.clip(0, 1), steps.clip(0, 1))[..., None]
    drawn = np.where(hatching(mark), ink, 255)[..., None]
    pixels[:] = np.rint((1 - share) * pixels + share * drawn)


def hatching(mark: str) -> np.ndarray:
    """Where a mark has ink, ``(MARK, MARK)``."""
    y, x = np.mgrid[:MARK, :MARK]
    if mark == "checked":
        return (x // 2 + y // 2) % 2 == 0
    return {"across": y, "upright": x, "rising": x + y, "falling": x - y}[mark] % 4 // 2 == 0


def train_small_marks_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words.

    Args:
        output_dir: where it is saved.

    Returns:
        The folder.
    """
    lines = [
        f"user\n{QUESTION.format(colour=colour)}\nassistant\n{colour} {mark}\n"
        for colour in COLOURS
        for mark in HATCHINGS
    ]
    lines += [f"user\n{REQUEST}\nassistant\n{c} {m}, {c} {m}\n" for c in COLOURS for m in HATCHINGS]
    learn_bpe(lines * 20, 384, template="chatml", max_length=1024).save_pretrained(str(output_dir))
    return Path(output_dir)
