"""What do camera poses and depth teach that words do not? Draws rooms, trains the arms from scratch, asks with every control.

    python benchmarks/room_demo.py                              # two CPU cores, all arms, one seed
    python benchmarks/room_demo.py --arms words,pose --seeds 0,1,2 --minutes 5     # in pieces: what is done is kept

Arms: `words` (no head), `pose`, `depth`, `both`: the same data, steps and tokens; heads are not run when a model answers. Beside each score
stand its controls on the same model: frames shuffled, one frame in every place, blank frames. Nothing is claimed in advance.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

POSE = {"type": "pose", "depth": 1, "num_heads": 4, "iterations": 2}
DEPTH = {"type": "depth_map", "cells": 2}
ARMS: dict[str, dict[str, Any]] = {
    "words": {},
    "pose": {"pose": POSE},
    "depth": {"far": DEPTH},
    "both": {"pose": POSE, "far": DEPTH},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/room_demo"))
    parser.add_argument("--rooms", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further arm after so many")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from mllm.demo.rooms import prepare_rooms, train_rooms_tokenizer

    started, root = time.perf_counter(), options.output
    data = root / "data"
    if not (data / "test.jsonl").is_file():
        prepare_rooms(data, num_train=options.rooms, num_test=options.tests)
        train_rooms_tokenizer(root / "tokenizer")
    for seed in options.seeds.split(","):
        for arm in options.arms.split(","):
            done = root / f"{arm}-{seed}.json"
            if not done.is_file() and time.perf_counter() - started < 60 * options.minutes:
                done.write_text(json.dumps(run(root, arm, int(seed), options.overrides), indent=1), encoding="utf-8")
            if done.is_file():
                tell(arm, seed, json.loads(done.read_text(encoding="utf-8")))
    return 0


def run(root: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate one arm. Returns its scores in %, those by kind of question, and the seconds it took."""
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.run import evaluate
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    heads = ARMS[arm]
    changes = [
        f"output={root / f'{arm}-{seed}'}",
        f"seed={seed}",
        f"model.language_model.tokenizer={root / 'tokenizer'}",
        f"stages.sft.data.path={root / 'data/train.jsonl'}",
        "stages.sft.save_every=40",
        f"model.heads={json.dumps(heads)}",
    ]
    rate = 2.0e-3
    learn = dict.fromkeys(["encoders", "connector", "language_model", *(["heads"] if heads else [])], rate)
    changes.append(f"stages.sft.learn={json.dumps(learn)}")
    began = time.perf_counter()
    begun = (root / f"{arm}-{seed}" / "checkpoints").is_dir()  # killed, and asked again
    final = run_recipe(load_recipe("room_demo", [*changes, *overrides]), resume=begun)
    trained = time.perf_counter()
    model, processor = load_model(str(final), device="cpu")
    generator = HFGenerator(model, processor, batch_size=64)
    result = evaluate(
        generator, ["room_demo"], root / f"{arm}-{seed}" / "eval", data={"room_demo": root / "data"}, blind=True
    )
    found = result["room_demo"]
    ways = {"as it is": found, "blank": found.blind, "another room": found.shuffled, **found.frames}
    records = [json.loads(line) for line in (root / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()]
    last = next((record["head_loss"] for record in reversed(records) if "head_loss" in record), {})
    return {
        "scores": {name: 100 * way.score for name, way in ways.items() if way is not None},
        "kinds": {one.name: one.value for one in sorted(found.categories, key=lambda one: one.name)},
        "heads": last,
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
    }


def tell(arm: str, seed: str, found: dict[str, Any]) -> None:
    """One arm's line."""
    for what in ("scores", "kinds"):
        print(
            f"{arm:6s} seed {seed} {what}: " + ", ".join(f"{name} {value:.1f}" for name, value in found[what].items())
        )
    if found["heads"]:
        print(
            f"{arm:6s} seed {seed} heads: " + ", ".join(f"{name} {value:.3f}" for name, value in found["heads"].items())
        )
    print(
        f"{arm:6s} seed {seed} " + ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items()),
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
