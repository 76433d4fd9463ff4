"""What does `float8: tensorwise` gain on one GPU, and what does it do to the loss?

`mllm train` itself, watched from outside, with the recipe of train_real.py: a Llama-7B with two live encoders, packed
2 x 4096, bf16 and float8 products in turn. Then a 1.1B from the same seed on text with a known spread (a Markov chain over
words), 520 steps each way: the mean loss of the last 100 steps, beside bf16 with other random weights. Goals: 1.20 times the
tokens a second, loss within 0.5 %.

    python benchmarks/train_float8.py                            # one GPU, about 8 minutes; also $OUT/train_float8.txt
    python benchmarks/train_float8.py --size tiny --device cpu --patience 6 --loss-steps 4   # checks the script
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import WORDS, compiled_in, measure, watch, write_recipe

SECTIONS = {
    "speed, bf16": 90.0,
    "speed, float8": 100.0,
    "loss, bf16": 110.0,
    "loss, float8": 110.0,
    "loss, bf16, other seed": 110.0,
}
SKIP, STEPS, LAST = 4, 20, 100


def _float8(name: str) -> dict:
    return {"float8": "tensorwise"} if "float8" in name else {}


def speed(options: argparse.Namespace, folder: Path, name: str) -> dict:
    short = "".join(c if c.isalnum() else "-" for c in name)
    settings = {"num_workers": 6, "compile": options.device == "cuda", **_float8(name)}
    recipe = write_recipe(folder, options.size, name=short, steps=200, **settings)
    seen = watch(recipe, steps=SKIP + STEPS, limit=SECTIONS[name] * options.patience - 5, **compiled_in(folder))
    shutil.rmtree(folder / short, ignore_errors=True)
    rates = [step["tflops"]["language_model"] for step in seen.steps[SKIP:] if "tflops" in step]
    return {
        "ms a step": round(1e3 * (seen.middle("seconds", SKIP) or 0)),
        "tokens_per_second": seen.middle("tokens_per_second", SKIP),
        "tflops": sorted(rates)[len(rates) // 2] if rates else None,
        "memory_gb": seen.middle("memory_gb", SKIP),
        "losses": [round(step["loss"], 4) for step in seen.steps[:3]],
        "first step s": seen.first_step,
        "exit code": seen.code,
    }


def loss(options: argparse.Namespace, folder: Path, name: str) -> dict:
    short = "".join(c if c.isalnum() else "-" for c in name)
    place = folder / "markov"
    if not (place / "data" / "rows.json").is_file():
        write_recipe(place, "tiny", name="unused", steps=1)  # pictures and tokenizer
        _markov(place / "data" / "rows.json", rows=40 * options.loss_steps)
    size = "tiny" if options.size == "tiny" else "1b"
    settings = {"num_workers": 6, "compile": options.device == "cuda", **_float8(name)}
    recipe = write_recipe(place, size, name=short, steps=options.loss_steps, **settings)
    if "other seed" in name:
        recipe.write_text(recipe.read_text().replace('"seed": 1', '"seed": 2'))
    seen = watch(recipe, steps=options.loss_steps, limit=SECTIONS[name] * options.patience - 5, **compiled_in(folder))
    shutil.rmtree(place / short, ignore_errors=True)
    losses = [step["loss"] for step in seen.steps]
    last = losses[-LAST:]
    return {
        "steps": len(losses),
        "loss at 1, 10, 50, 100, 200, 400": [
            round(losses[i - 1], 4) for i in (1, 10, 50, 100, 200, 400) if i <= len(losses)
        ],
        f"mean of the last {len(last)}": round(sum(last) / len(last), 5) if last else None,
        "tokens_per_second": seen.middle("tokens_per_second", SKIP),
    }


def _markov(path: Path, *, rows: int) -> None:
    """Answers in which each word chooses the next among three (0.6, 0.3, 0.1): 0.9 nats a word that nobody can learn away."""
    draw = random.Random(0)
    following = {word: draw.sample(WORDS, 3) for word in WORDS}
    pictures = len(list(path.parent.glob("*.jpg")))
    data = []
    for row in range(rows):
        words = [draw.choice(WORDS)]
        for _ in range(40 + row % 80):
            words.append(draw.choices(following[words[-1]], (6, 3, 1))[0])
        turns = [{"from": "human", "value": "<image>\nWhat can be seen?"}, {"from": "gpt", "value": " ".join(words)}]
        data.append({"id": str(row), "image": f"{row % pictures}.jpg", "conversations": turns})
    path.write_text(json.dumps(data), encoding="utf-8")


def work(options: argparse.Namespace, folder: Path, name: str) -> dict:
    return {"speed": speed, "loss": loss}[name.split(",")[0]](options, folder, name)


def main() -> None:
    measure(__file__, __doc__, SECTIONS, work, limit=560.0, own={"loss-steps": {"type": int, "default": 520}})


if __name__ == "__main__":
    main()
