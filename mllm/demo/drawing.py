"""What does a model learn from that reads digits and draws them? One picture is the input of a question and the answer to a request."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mllm.demo.charts_and_digits import DIGIT_QUESTIONS

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REQUESTS = ("Draw a {digit}.", "Draw the digit {name}.", "Show me a {digit}.", "Please draw the digit {digit}.")
SPLITS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")


def drawing_request(digit: int, kind: int = 0) -> str:
    """A request to draw a digit, in one of the ``REQUESTS``."""
    return REQUESTS[kind].format(digit=digit, name=NAMES[digit])


def prepare_drawing(
    output_dir: Path | str = "runs/unified_demo/data", *, size: int = 64, seed: int = 0, codes: bool = False
) -> dict[str, Path]:
    """Write ``{read,draw}_{train,held_out}.jsonl`` with their PNG images; returns name → file.

    scikit-learn's handwritten digits in the split of the image source ``digits_and_charts`` (every fifth held out), so that
    a tokenizer trained on that source has not seen the held-out ones. ``read``: picture → "Which digit is this?";
    ``draw``: a request → picture. codes: refer to ``codes/<split>/codes.json#k`` (``mllm tokenizer encode`` of the same
    source without charts) in place of the pictures. Deterministic by seed.
    """
    from mllm.visual_tokenizers.images import DigitsAndCharts, DigitsAndChartsOptions

    root = Path(output_dir)
    files: dict[str, Path] = {}
    for split in SPLITS:
        source = DigitsAndCharts(DigitsAndChartsOptions(charts=0), size, split)
        assert source.labels is not None
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"drawing/{split}/{seed}")
        rows: dict[str, list[dict[str, Any]]] = {"read": [], "draw": []}
        for number, digit in enumerate(source.labels.tolist()):
            name = f"{split}/{number:04d}.png"
            if not (root / name).is_file():
                Image.fromarray(source.batch([number])[0].permute(1, 2, 0).numpy()).save(root / name)
            image = {"type": "image", "image": f"codes/{split}/codes.json#{number}" if codes else name}
            question = {"type": "text", "text": "\n" + rng.choice(DIGIT_QUESTIONS)}
            request = drawing_request(digit, rng.randrange(len(REQUESTS)))
            rows["read"].append(_row(f"read-{number:04d}", [image, question], str(digit)))
            rows["draw"].append(_row(f"draw-{number:04d}", request, [image]))
        for name, content in rows.items():
            files[f"{name}_{split}"] = path = root / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return files


def _row(identity: str, question: Any, answer: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def train_text_tokenizer(output_dir: Path | str, *, vocab_size: int = 384) -> Path:
    """A byte-level BPE tokenizer with the Vicuna template for these requests and answers, saved for transformers;
    returns ``output_dir``. Deterministic."""
    from mllm.demo.charts_and_digits import learn_bpe

    requests = [drawing_request(digit, kind) for digit in range(10) for kind in range(len(REQUESTS))]
    lines = [f"USER: {text} " for text in (*requests, *DIGIT_QUESTIONS)] + [
        f"ASSISTANT: {digit} " for digit in range(10)
    ]
    learn_bpe(lines, vocab_size).save_pretrained(str(output_dir))
    return Path(output_dir)
