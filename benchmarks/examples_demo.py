"""Does a small model mark in one picture what a mask in another picture marks?

Draws pairs of scenes (`mllm.demo.scenes`) that hold two things of the same looks, and a third that differs; in the first one of the two
is marked, and the same look is to be marked in the second. ``recipes/segmentation_demo.yaml`` with ``heads.marks.examples`` is trained on
them, from scratch; looks of the tests were marked in no training pair. Dice and IoU on pairs that were not trained, and beside them the
same model shown the wrong mask: of the other shared thing (scored against what is wanted, and against what that mask asks for), and
of everything. Writes ``report.json``.

    python benchmarks/examples_demo.py                # runs/examples_demo, two CPU cores
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.scenes import COLOURS, SHAPES, UNSEEN, Scene, draw_scene, train_text_tokenizer
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.mask_files import decode_rle, encode_rle
from mllm.processing.processor import MllmProcessor
from mllm.recipe import load_recipe
from mllm.train.run import run_recipe

QUESTION, ANSWER = "<image> [EX]\n<image>\nPlease segment the same.", "It is [SEG]."
LOOKS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def pair(rng: random.Random, marked: list[tuple[str, str]]) -> tuple[Scene, Scene, tuple[str, str], tuple[str, str]]:
    """Two scenes with two looks in common, the one to be marked (one of ``marked``), and the other one."""
    while True:
        wanted = rng.choice(marked)
        alike = [look for look in LOOKS if look != wanted and (look[0] == wanted[0] or look[1] == wanted[1])]
        other = rng.choice(alike if rng.random() < 0.5 else [look for look in LOOKS if look != wanted])
        rest = [look for look in LOOKS if look not in (wanted, other)]
        scenes = [draw_scene(rng, rng.sample(three := [wanted, other, rng.choice(rest)], len(three))) for _ in range(2)]
        if all({wanted, other} <= {(t.colour, t.shape) for t in scene.things} for scene in scenes):
            return scenes[0], scenes[1], wanted, other


def mask_of(scene: Scene, look: tuple[str, str]) -> dict[str, Any]:
    return encode_rle(next(thing.mask for thing in scene.things if (thing.colour, thing.shape) == look))


def prepare(root: Path, *, train: int, tests: int, seed: int) -> None:
    """``train.jsonl`` and ``test.jsonl`` with their pictures."""
    for name, number, marked in (
        ("train", train, [x for x in LOOKS if x not in UNSEEN]),
        ("test", tests, list(UNSEEN)),
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
        rng, rows = random.Random(f"examples/{name}/{seed}"), []
        for place in range(number):
            first, second, wanted, other = pair(rng, marked)
            files = [f"{name}/{place:05d}-{k}.png" for k in range(2)]
            for file, scene in zip(files, (first, second)):
                scene.picture.save(root / file)
            turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
            masks = [mask_of(first, wanted), mask_of(second, wanted)]
            row: dict[str, Any] = {"id": f"{name}-{place}", "images": files, "messages": turns, "masks": masks}
            if name == "test":
                row["other"] = [mask_of(first, other), mask_of(second, other)]
            rows.append(row)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored(found: list[Any], wanted: list[np.ndarray]) -> dict[str, float]:
    """Mean Dice and IoU in percent, and how many have an IoU of 0.5."""
    shares = []
    for answer, mask in zip(found, wanted):
        mark = answer.union.numpy()
        shares.append(float((mark & mask).sum() / max((mark | mask).sum(), 1)))
    dice = [2 * share / (1 + share) for share in shares]
    half = [share >= 0.5 for share in shares]
    return {
        name: round(100 * float(np.mean(v)), 1) for name, v in (("dice", dice), ("iou", shares), ("iou >= 0.5", half))
    }


def measure(checkpoint: Path, data: Path) -> dict[str, Any]:
    model: Any = MllmForConditionalGeneration.from_pretrained(str(checkpoint)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = MllmProcessor.from_pretrained(str(checkpoint))
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]

    def masks(key: str, number: int) -> list[np.ndarray]:
        return [np.asarray(decode_rle(row[key][number])).astype(bool) for row in rows]

    def marked(shown: list[np.ndarray]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(rows), 50):
            part = slice(start, start + 50)
            pairs = [(str(data / row["images"][0]), mask) for row, mask in zip(rows[part], shown[part])]
            pictures = [str(data / row["images"][1]) for row in rows[part]]
            found += model.segment(pictures, example=pairs, processor=processor, max_new_tokens=8)
        return found

    own, wrong = marked(masks("masks", 0)), marked(masks("other", 0))
    return {
        "samples": len(rows),
        "by the example": scored(own, masks("masks", 1)),
        "shown the other thing's mask": scored(wrong, masks("masks", 1)),
        "the same, by what that mask asks for": scored(wrong, masks("other", 1)),
        "shown a mask of everything": scored(marked([mask | True for mask in masks("masks", 0)]), masks("masks", 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/examples_demo"))
    parser.add_argument("--train", type=int, default=4000, help="pairs (default: 4000)")
    parser.add_argument("--tests", type=int, default=250, help="pairs (default: 250)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order; pairs stay (default: 0)")
    options = parser.parse_args()
    root, began = options.output, time.perf_counter()
    prepare(root / "data", train=options.train, tests=options.tests, seed=0)
    data = {
        "format": "messages",
        "path": str(root / "data" / "train.jsonl"),
        "licence": "Apache-2.0",
        "name": "examples",
    }
    changes = [
        f"seed={options.seed}",
        f"model.language_model.tokenizer={train_text_tokenizer(root / 'text_tokenizer')}",
        "model.heads.marks.examples={queries: 8, heads: 4, mlp_width: 192}",
        f"stages.sft.data={json.dumps({'datasets': [{'dataset': data}]})}",
        f"stages.sft.steps={options.steps}",
        "stages.sft.batch_size=16",
    ]
    checkpoint = run_recipe(load_recipe("segmentation_demo", [*changes, *options.overrides]), output=root / "model")
    report: dict[str, Any] = {"seed": options.seed, "training_seconds": round(time.perf_counter() - began)}
    report |= measure(checkpoint, root / "data")
    (root / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
