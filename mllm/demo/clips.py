"""What does the video demo learn from? Clips of coloured shapes that come one after another, and the question which came first or last.

Every frame shows one shape, so that a single frame, or all frames in another order, says nothing about the answer: what a model
gains over those controls it has read from the order.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from mllm.demo.charts_and_digits import learn_bpe

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SIZE, SHAPES, FRAMES_EACH, MILLISECONDS = 32, 3, 2, 500
QUESTIONS = {"first": "Which colour comes first?", "last": "Which colour comes last?"}


def prepare_clips(output_dir: Path | str, *, num_train: int = 1500, num_test: int = 300, seed: int = 0) -> Path:
    """Write ``train.jsonl`` and ``test.jsonl`` (messages with a video part) and their clips, GIFs of 3 s. Deterministic by seed.
    Returns the folder."""
    root = Path(output_dir)
    (root / "clips").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", num_train), ("test", num_test)):
        rows = []
        for number in range(count):
            colours = rng.sample(sorted(COLOURS), SHAPES)
            clip = f"clips/{split}-{number:05d}.gif"
            _draw([colour for colour in colours for _ in range(FRAMES_EACH)], rng, root / clip)
            kind = rng.choice(sorted(QUESTIONS))
            answer = colours[0 if kind == "first" else -1]
            content = [{"type": "video", "video": clip}, {"type": "text", "text": "\n" + QUESTIONS[kind]}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            row = {"id": f"{split}-{number}", "clip": clip, "kind": kind, "question": QUESTIONS[kind], "answer": answer}
            rows.append(row | {"messages": messages})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def train_clips_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words. Returns ``output_dir``."""
    lines = [f"user\n{question}\nassistant\n{colour}\n" for question in QUESTIONS.values() for colour in COLOURS]
    learn_bpe(lines * 20, 320, template="chatml", max_length=512).save_pretrained(str(output_dir))
    return Path(output_dir)


def _draw(colours: list[str], rng: random.Random, path: Path) -> None:
    """One shape a frame, on grey, never twice at the same place (else equal frames would become one in the file)."""
    frames: list[Image.Image] = []
    places: set[tuple[int, int]] = set()
    for colour in colours:
        frame = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
        side = rng.randint(12, 18)
        place = (rng.randint(0, SIZE - side), rng.randint(0, SIZE - side))
        while place in places:
            place = (rng.randint(0, SIZE - side), rng.randint(0, SIZE - side))
        places.add(place)
        box = (*place, place[0] + side, place[1] + side)
        pen = ImageDraw.Draw(frame)
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=COLOURS[colour])
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)
