"""Does GRPO with VSI-Bench's reward teach a video model anything? Draws rooms, trains by words, then by reward, beside a control.

    python benchmarks/room_reward.py --seeds 0,1          # one CPU core, about two hours a seed beside other work
    python benchmarks/room_reward.py --seeds 0,1 --tell   # only what is done

Arms, each from the same first stage of its seed: `words` (that stage alone), `reward` (the rows' own answers), `unrelated` (the same
questions, answers of other rooms of their kind: what the reward's form teaches without the rooms). Scores are of held-out rooms, beside
the same model's on blank frames and another room's clip.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARMS = {"words": None, "reward": "reward.jsonl", "unrelated": "unrelated.jsonl"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/room_reward"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tell", action="store_true", help="print what is done")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for seed in map(int, options.seeds.split(",")):
        for arm in ARMS:
            done = options.output / f"{arm}-{seed}.json"
            if not done.is_file() and not options.tell:
                done.write_text(
                    json.dumps(run(options.output, arm, seed, options.overrides), indent=1), encoding="utf-8"
                )
            if done.is_file():
                tell(arm, seed, json.loads(done.read_text(encoding="utf-8")))
    return 0


def run(root: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one arm where it is not trained yet, and ask it. Returns scores in %, those by kind of question, and the rewards."""
    from mllm.demo.room_measures import prepare_measures, train_measures_tokenizer
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.run import evaluate
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    data = root / "data"
    if not (data / "test.jsonl").is_file():
        prepare_measures(data, num_words=3000, num_reward=800)
        train_measures_tokenizer(root / "tokenizer")
    began, output = time.perf_counter(), root / f"{arm}-{seed}"
    given = [f"output={output}", f"seed={seed}", f"model.language_model.tokenizer={root / 'tokenizer'}", *overrides]
    recipe = load_recipe("room_reward", given)
    recipe.stages[0].data = {"format": "messages", "path": str(data / "words.jsonl")}
    file = ARMS[arm]
    if file is None:
        recipe.stages = recipe.stages[:1]
    else:
        recipe.stages[1].data = {"format": "messages", "path": str(data / file)}
        if not output.is_dir():  # the first stage is that of the arm `words`, and not trained again
            shutil.copytree(root / f"words-{seed}" / "sft", output / "sft")
    final = run_recipe(recipe, resume=(output / "sft").is_dir())
    model, processor = load_model(str(final), device="cpu")
    found = evaluate(
        HFGenerator(model, processor, batch_size=64),
        ["room_reward"],
        output / "eval",
        data={"room_reward": data},
        blind=True,
    )["room_reward"]
    ways = {"as it is": found, "blank": found.blind, "another room": found.shuffled, **found.frames}
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "scores": {name: 100 * way.score for name, way in ways.items() if way is not None},
        "kinds": {one.name: one.value for one in sorted(found.categories, key=lambda one: one.name)},
        "rewards": tenths([record["reward"] for record in records if "reward" in record]),
        "kl": tenths([record["kl"] for record in records if "kl" in record]),
        "seconds": time.perf_counter() - began,
    }


def tenths(values: list[float]) -> list[float]:
    """Means over each tenth of a run's steps."""
    step = max(1, len(values) // 10)
    return [statistics.fmean(values[k : k + step]) for k in range(0, len(values), step)]


def tell(arm: str, seed: int, found: dict[str, Any]) -> None:
    """One arm's lines."""
    for what, digits in (("scores", 1), ("kinds", 1)):
        print(f"{arm:10s} seed {seed} {what}: " + ", ".join(f"{k} {v:.{digits}f}" for k, v in found[what].items()))
    for what in ("rewards", "kl"):
        if found[what]:
            print(f"{arm:10s} seed {seed} {what} by tenths: " + " ".join(f"{value:.3f}" for value in found[what]))
    print(f"{arm:10s} seed {seed} {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
