"""What does a model learn from that tells drawn pictures from edited ones? Scenes, and the same scenes with one thing painted anew.

An edit leaves what generators leave: over the thing that was painted anew lies a faint grid of two pixels' period (the checkerboard that
upsampling layers are known for), on a picture whose every pixel carries noise. How faint it is differs from
picture to picture, so some edits are plain and some cannot be told: a probability of one half is then the right answer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.conversations import picture_messages
from mllm.demo.scenes import COLOURS, SHAPES, Scene, Thing, draw_scene

NOISE = 8.0
"""Standard deviation of every pixel's noise, of 255."""
FAINT, PLAIN = 2.0, 26.0
"""Least and greatest height of the grid, of 255."""
PHRASE = "<CONCLUSION> This image is"
WORDS = ("real", "fake")
QUESTION = "Is this image real or fake?"
ANSWER = "<REASONING> There is {things}. </REASONING> {phrase} {word}. </CONCLUSION>"
"""FakeReasoning's form. The reasoning names what is there and does not give the verdict away: the probability is the picture's."""


def photograph(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A scene as a camera would give it: ``(H, W, 3)`` uint8, with noise on every pixel."""
    values = np.asarray(scene.picture).astype(np.float32)
    return _written(values + rng.normal(0, NOISE, values.shape))


def paint_anew(pixels: np.ndarray, thing: Thing, height: float) -> np.ndarray:
    """The picture with ``thing`` edited: a grid of so many grey levels over it; nothing outside its mask changes."""
    rows, columns = np.indices(thing.mask.shape)
    grid = np.where((rows + columns) % 2 == 0, height, -height)[..., None]
    return np.where(thing.mask[..., None], _written(pixels + grid), pixels)


def _written(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def prepare_forgeries(
    output_dir: Path | str = "runs/forgery_demo/data",
    *,
    train: int = 4000,
    validation: int = 600,
    test: int = 1000,
    seed: int = 0,
) -> Path:
    """Write ``{train,validation,test}.jsonl`` of rows with their PNG pictures: every scene once as it is and once edited.

    Args:
        output_dir: a folder, made where it is missing.
        train: training pictures, half of them edited.
        validation: pictures for the temperature and the threshold.
        test: pictures that nothing else looks at.
        seed: of all that is drawn.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        rng, noise = random.Random(f"forgery/{split}/{seed}"), np.random.default_rng([seed, len(split)])
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            scene = draw_scene(rng)
            if not scene.things:
                continue
            thing, height = rng.choice(scene.things), rng.uniform(FAINT, PLAIN)
            pixels = photograph(scene, noise)
            for word, made in zip(WORDS, (pixels, paint_anew(pixels, thing, height))):
                name = f"pictures/{split}-{len(rows):05d}.png"
                Image.fromarray(made).save(root / name)
                rows.append(_row(name, scene, word, height if word == "fake" else 0.0))
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (root / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root


def _row(name: str, scene: Scene, word: str, height: float) -> dict[str, Any]:
    things = " and ".join(f"a {thing.colour} {thing.shape}" for thing in scene.things[:2])
    answer = ANSWER.format(things=things, phrase=PHRASE, word=word)
    row = {"id": Path(name).stem, "image": name, "answer": word, "height": round(height, 3)}
    return {**row, "messages": picture_messages(name, [(QUESTION, answer)])}


def train_forgery_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words; returns ``output_dir``."""
    from mllm.demo.charts_and_digits import learn_bpe

    looks = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    lines = [f"USER: {QUESTION} "] * 8
    for number, look in enumerate(looks):
        things, word = f"{look} and {looks[number - 1]}", WORDS[number % 2]
        lines.append(f"ASSISTANT: {ANSWER.format(things=things, phrase=PHRASE, word=word)} ")
    learn_bpe(lines * 10, 512).save_pretrained(str(output_dir))
    return Path(output_dir)
