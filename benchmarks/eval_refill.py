"""Would refilling a batch as soon as one answer ends pay, and how much at most?

The harness's batches are fixed: a batch runs until its longest answer ends. Refilling saves at most the steps that finished answers
still take part in. This measures that bound: the same questions, in batches of prompt order (what the generator does) and in
batches sorted by answer length, known beforehand (few steps are wasted). From the two the cost of a step follows, and from that
what an ideal refill would save, whose steps are all answers' tokens over the batch size; a real one must also prefill new prompts
one by one and join caches of different lengths. Answer lengths are drawn, not the model's own: ``short`` as on the benchmarks
that ask for a word, ``mixed`` with one answer in eight written out, ``long`` as free-form reasoning.

    OMP_NUM_THREADS=1 python benchmarks/eval_refill.py
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.eval_overhead import build
from mllm.processing.chat import render_prompt
from mllm.types import IMAGE_MARK, Turn

LENGTHS = {
    "short": lambda draw: draw.choice([1, 1, 2, 2, 3, 4, 6]),
    "mixed": lambda draw: draw.randint(12, 16) if draw.random() < 1 / 8 else draw.randint(1, 4),
    "long": lambda draw: draw.randint(8, 64),
}


class EndAt(StoppingCriteria):
    """Row k is done after ``lengths[k]`` new tokens."""

    def __init__(self, prompt: int, lengths: list[int]):
        self.prompt, self.lengths = prompt, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt >= self.lengths


def answer(model: Any, processor: Any, questions: list[tuple[str, Image.Image, int]], size: int) -> tuple[float, int]:
    """(CPU seconds, decoding steps) of all questions in batches of ``size`` in the order given."""
    started, steps = time.process_time(), 0
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        inputs = processor(
            text=[text for text, _, _ in batch],
            images=[[image] for _, image, _ in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        width, lengths = inputs["input_ids"].shape[1], [length for _, _, length in batch]
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                pad_token_id=processor.tokenizer.pad_token_id,
                max_new_tokens=max(lengths),
                stopping_criteria=StoppingCriteriaList([EndAt(width, lengths)]),
            )
        steps += output.shape[1] - width
    return time.process_time() - started, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')} · Python {platform.python_version()} · torch {torch.__version__} · transformers "
        f"{transformers.__version__} · CPU, {torch.get_num_threads()} thread · {arguments.samples} questions, "
        f"batches of {arguments.batch_size}, 42 M parameters, two encoders, float32"
    )
    with tempfile.TemporaryDirectory() as name:
        model, processor = build(Path(name) / "tokenizer")
        model.generation_config.eos_token_id = None
        generator, draw = np.random.default_rng(0), random.Random(0)
        images = [
            Image.fromarray(generator.integers(0, 256, (120, 160, 3), dtype=np.uint8)) for _ in range(arguments.samples)
        ]
        texts = [
            render_prompt(processor, [Turn("user", f"{IMAGE_MARK}\nHow high is bar {k}?")])
            for k in range(arguments.samples)
        ]
        for kind, length in LENGTHS.items():
            asked = [(text, image, length(draw)) for text, image in zip(texts, images)]
            ideal = sorted(asked, key=lambda row: row[2])
            answer(model, processor, asked[: arguments.batch_size], arguments.batch_size)
            rounds = []
            for k in range(arguments.rounds):
                first, second = (asked, ideal) if k % 2 == 0 else (ideal, asked)
                one = answer(model, processor, first, arguments.batch_size)
                two = answer(model, processor, second, arguments.batch_size)
                rounds.append((one, two) if k % 2 == 0 else (two, one))
            fixed, best = (statistics.median(row[side][0] for row in rounds) for side in (0, 1))
            mean = sum(length for _, _, length in asked) / len(asked)
            steps, fewer = rounds[0][0][1], rounds[0][1][1]
            least = sum(length for _, _, length in asked) / arguments.batch_size
            bound = (fixed - best) / max(steps - fewer, 1) * (steps - least) / fixed
            print(
                f"{kind:6} mean answer {mean:4.1f} tokens: fixed batches {steps:4} steps {fixed:6.2f} s CPU; "
                f"sorted {fewer:4} steps {best:6.2f} s; an ideal refill {least:5.1f} steps, saves at most {bound:5.1%}"
            )


if __name__ == "__main__":
    main()
