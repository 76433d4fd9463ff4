"""What does the routing demo learn from? Three kinds of pictures whose shape hides each from the experts of the others.

Bar charts twice as wide as high; handwritten digits, small in the middle of a tall strip; letters printed on a wide line. Each expert
keeps the details of one kind and loses those of the other two: one fits everything into a small wide frame, one sees only the middle
square (never a chart's last bar, nor a letter), one only a flat line through the middle. Experts specialised by construction.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllm.demo.charts import COLOURS, LABELS, MAX_VALUE, Chart, Renderer
from mllm.demo.charts_and_digits import learn_bpe
from mllm.errors import UnavailableError
from mllm.install import install_hint, package_hint

VERSION = 6
"""Raised when the data that a seed gives changes."""
EXPERT_OF = {"charts": "chart", "digits": "digit", "text": "text"}
"""Kind of picture → the expert that was made for it (names as in the recipe ``routed_demo``)."""
CHART_SIZE = 80
DIGIT_SIZE = 16
TEXT_HEIGHT = 12
STRIP = 32
"""Length of digit strips and text lines over their breadth."""
ALPHABET = "ACEHKLNPTX"
COPIES = 6
"""How often a line shows its letter. Shown once, a small model spends a whole training on finding the place."""
READ = "What is written here?"
MEASURE = "How high is the last bar?"


@dataclass(frozen=True)
class RoutingDemoData:
    """Where the files are. train, test: jsonl with messages, ``kind``, ``question`` and ``answer``; specialise: the training rows
    with ``experts``, the one made for the kind, which fixes their routing."""

    specialise: Path
    train: Path
    test: Path
    counts: dict[str, int]


def prepare_routing_demo(
    output_dir: Path | str, *, num_train: int = 2000, num_test: int = 200, seed: int = 0
) -> RoutingDemoData:
    """Write ``train.jsonl``, ``specialise.jsonl`` and ``test.jsonl`` with so many pictures of each kind, and the pictures.
    Deterministic by seed; does nothing when the same data are there. Test digits are images that training has not seen."""
    root = Path(output_dir)
    settings = {"version": VERSION, "num_train": num_train, "num_test": num_test, "seed": seed}
    mark = root / "manifest.json"
    specialise, train, test = files = [root / f"{name}.jsonl" for name in ("specialise", "train", "test")]
    data = RoutingDemoData(specialise, train, test, {"train": 3 * num_train, "test": 3 * num_test})
    if _complete(mark, settings, files):
        return data
    root.mkdir(parents=True, exist_ok=True)
    renderer, digits = Renderer(CHART_SIZE), _digits(seed)
    hashes = {}
    for split, count in (("train", num_train), ("test", num_test)):
        rng = random.Random(f"routing/{split}/{seed}")
        (root / split).mkdir(exist_ok=True)
        rows = []
        for number in range(count):
            for kind in EXPERT_OF:
                pixels, question, answer = _draw(kind, rng, renderer, digits[split])
                name = f"{split}/{kind}-{number:05d}.png"
                Image.fromarray(pixels).save(root / name, compress_level=1)
                rows.append(_row(f"{kind}-{split}-{number:05d}", name, kind, question, answer))
        hashes |= _write(root / f"{split}.jsonl", rows)
        if split == "train":
            own = [{**row, "experts": [EXPERT_OF[row["kind"]]]} for row in rows]
            hashes |= _write(root / "specialise.jsonl", own)
    mark.write_text(json.dumps({"settings": settings, "files": hashes}, indent=1), encoding="utf-8")
    return data


def train_routing_tokenizer(data: RoutingDemoData, output_dir: Path | str, *, vocab_size: int = 384) -> Path:
    """A byte-level BPE tokenizer (ChatML) learned from the questions alone, so that letters stay single tokens,
    saved for transformers. Returns ``output_dir``."""
    output = Path(output_dir)
    if (output / "tokenizer.json").is_file():
        return output
    rows = [json.loads(line) for line in data.train.read_text(encoding="utf-8").splitlines()]
    lines = (f"user\n{row['question']}\nassistant\n" for row in rows)
    learn_bpe(lines, vocab_size, template="chatml", max_length=2048).save_pretrained(str(output))
    return output


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Write rows as jsonl; returns name → sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return {path.name: hashlib.sha256(text.encode()).hexdigest()}


def _complete(mark: Path, settings: dict[str, Any], files: list[Path]) -> bool:
    try:
        manifest = json.loads(mark.read_text(encoding="utf-8"))
        same = all(hashlib.sha256(f.read_bytes()).hexdigest() == manifest["files"][f.name] for f in files)
        return manifest["settings"] == settings and same
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _row(identity: str, image: str, kind: str, question: str, answer: str) -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "\n" + question}]
    return {
        "id": identity,
        "image": image,
        "kind": kind,
        "question": question,
        "answer": answer,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
    }


def _draw(
    kind: str, rng: random.Random, renderer: Renderer, digits: list[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, str, str]:
    """(RGB pixels, question, answer) of one sample."""
    if kind == "charts":
        return _chart(rng, renderer)
    if kind == "digits":
        pixels, digit = rng.choice(digits)
        return _digit_strip(rng, pixels), READ, str(digit)
    letter = rng.choice(ALPHABET)
    return _text_line(rng, letter), READ, letter


def _chart(rng: random.Random, renderer: Renderer) -> tuple[np.ndarray, str, str]:
    """A bar chart, 2:1; the question is its last bar's height, in units of the axis. The last bar lies in the right quarter."""
    bars = rng.randint(4, 5)
    heights = tuple(rng.randint(1, MAX_VALUE) for _ in range(bars))
    chart = Chart("bar", tuple(rng.sample(sorted(COLOURS), bars)), heights, LABELS[:bars])
    wide = Image.fromarray(renderer.draw(chart)).resize((2 * CHART_SIZE, CHART_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(wide), MEASURE, str(heights[-1])


def _digit_strip(rng: random.Random, digit: np.ndarray) -> np.ndarray:
    """A dark strip, ``STRIP`` times as tall as broad, with a digit in its middle."""
    height = DIGIT_SIZE * STRIP
    strip = np.random.default_rng(rng.getrandbits(32)).integers(0, 30, (height, DIGIT_SIZE, 3)).astype(np.uint8)
    grey = np.asarray(Image.fromarray(digit).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))
    top = (height - DIGIT_SIZE) // 2 + rng.randint(-1, 1)
    strip[top : top + DIGIT_SIZE] = np.maximum(strip[top : top + DIGIT_SIZE], grey[:, :, None])
    return strip


def _text_line(rng: random.Random, letter: str) -> np.ndarray:
    """A pale noisy line, ``STRIP`` times as broad as tall, with ``COPIES`` of a letter on it, none in the middle."""
    cell = TEXT_HEIGHT
    noise = np.random.default_rng(rng.getrandbits(32)).integers(200, 256, (TEXT_HEIGHT, TEXT_HEIGHT * STRIP, 1))
    image = Image.fromarray(noise.repeat(3, axis=2).astype(np.uint8))
    draw, font = ImageDraw.Draw(image), _font()
    for place in rng.sample([p for p in range(STRIP) if abs(p + 0.5 - STRIP / 2) > 2], COPIES):
        centre = (place + 0.5) * cell + rng.uniform(-1, 1), cell / 2 + rng.uniform(-0.5, 0.5)
        draw.text(centre, letter, font=font, fill=(rng.randint(0, 60),) * 3, anchor="mm")
    return np.asarray(image)


def _font() -> Any:
    if not hasattr(ImageFont, "FreeTypeFont"):
        raise UnavailableError(
            f"the routing demo draws text, which needs a Pillow with FreeType: {package_hint('-U', 'pillow')}"
        )
    return ImageFont.load_default(size=11)


def _digits(seed: int) -> dict[str, list[tuple[np.ndarray, int]]]:
    """scikit-learn's handwritten digits by split, a fifth of them for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnavailableError(f"the demo's data needs scikit-learn: {install_hint('train')}") from None
    found: Any = load_digits()
    images = [np.rint(pixels * (255 / 16)).astype(np.uint8) for pixels in found.images]
    pairs = list(zip(images, found.target.tolist()))
    random.Random(f"routing/digits/{seed}").shuffle(pairs)
    cut = len(pairs) // 5
    return {"test": pairs[:cut], "train": pairs[cut:]}
