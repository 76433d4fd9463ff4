"""Does a model read the order of a clip's frames? Draws clips, trains from scratch, and asks with every control.

    python benchmarks/video_demo.py                        # two CPU cores; exit code 1 when a check fails
    python benchmarks/video_demo.py --output /tmp/x --clips 200 --tests 50 stages.sft.steps=20     # only to try the script

Checks on held-out clips: at least 90 % as they are, at least 40 points above the best of shuffled frames, one frame and blank (each at
the same number of tokens); reversed clips turn first into last, so they must lie below chance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/video_demo"))
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--tests", type=int, default=300)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from mllm.demo.clips import prepare_clips, train_clips_tokenizer
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.run import evaluate
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    started, root = time.perf_counter(), options.output
    begun, data = (root / "checkpoints").is_dir(), root / "data"  # begun: killed, and asked again
    if not begun:
        prepare_clips(data, num_train=options.clips, num_test=options.tests)
        train_clips_tokenizer(root / "tokenizer")
    places = [
        f"output={root}",
        f"model.language_model.tokenizer={root / 'tokenizer'}",
        f"stages.sft.data.path={data / 'train.jsonl'}",
        "stages.sft.save_every=50",
    ]
    drawn = time.perf_counter()
    final = run_recipe(load_recipe("video_demo", [*places, *options.overrides]), resume=begun)
    trained = time.perf_counter()
    model, processor = load_model(str(final), device="cpu")
    result = evaluate(
        HFGenerator(model, processor, batch_size=64),
        ["video_demo"],
        root / "eval",
        data={"video_demo": data},
        blind=True,
    )["video_demo"]
    ways = {"as it is": result, "blank": result.blind, "another clip": result.shuffled, **result.frames}
    scores = {name: 100 * way.score for name, way in ways.items() if way is not None}
    floor = max(scores[name] for name in ("frames_shuffled", "frames_frozen", "blank"))
    checks = {
        "clips as they are at least 90 %": scores["as it is"] >= 90,
        "at least 40 points above shuffled frames, one frame, blank": scores["as it is"] >= floor + 40,
        "reversed clips below 16.7 %": scores["frames_reversed"] < 100 / 6,
    }
    seconds = {"data": drawn - started, "training": trained - drawn, "evaluation": time.perf_counter() - trained}
    report = {"scores": scores, "checks": checks, "seconds": {k: round(v, 1) for k, v in seconds.items()}}
    (root / "benchmark.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, score in scores.items():
        print(f"{score:6.1f} %  {name}")
    for name, passed in checks.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
