"""Do tiles let a model read what the whole picture at 112 pixels hides, and does the native size do so with fewer tokens?

Draws charts, trains one model from scratch in three ways of looking at equal steps on the same rows, and asks each with its controls
(blank, another chart, the commonest answer). A fourth way, ``budgets``, is native and learns at 64, 36, 16 and 4 tokens a chart (a
dataset's ``visual_tokens``); it is asked at each.

    python benchmarks/tiles_demo.py                        # two CPU cores; exit code 1 when a check fails
    python benchmarks/tiles_demo.py --seed 1 --output runs/tiles_demo_1    # other weights, other charts to learn from and to ask about
    python benchmarks/tiles_demo.py --way budgets stages.captions.steps=300 stages.sft.steps=300
    python benchmarks/tiles_demo.py --output /tmp/x --charts 64 --tests 20 --close-ups 64 stages.close_ups.steps=3 \
        stages.captions.steps=3 stages.sft.steps=3     # only to try the script

Checks on held-out charts: tiles at least 40 points above the same model without them; native within 3 points of tiles, at fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAYS = {
    "tiles": [],
    "single": ["model.views={type: single}"],
    "native": ["model.views={type: native, rule: qwen, max_patches: 256}"],
    "budgets": ["model.views={type: native, rule: qwen, max_patches: 256}"],
}
"""Way of looking → what it changes in the recipe."""
DATA = {"close_ups": "close_ups", "captions": "captions", "sft": "train"}
"""Stage → its rows."""
PICTURE = (448, 448)
BUDGETS = (64, 36, 16, 4)
"""Visual tokens of a chart that ``budgets`` learns with, a quarter of its rows each, and is asked at."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value, of all three")
    parser.add_argument("--output", type=Path, default=Path("runs/tiles_demo"))
    parser.add_argument("--charts", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=300)
    parser.add_argument("--close-ups", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this one (may be given again)")
    options = parser.parse_args()
    ways = options.way or [way for way in WAYS if way != "budgets"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from mllm.demo.small_marks import prepare_small_marks, train_small_marks_tokenizer

    root = options.output
    counts = {"num_train": options.charts, "num_test": options.tests, "num_close_ups": options.close_ups}
    data = prepare_small_marks(root / "data", **counts, seed=options.seed)
    places = [
        f"seed={options.seed}",
        f"model.language_model.tokenizer={train_small_marks_tokenizer(root / 'tokenizer')}",
        *(f"stages.{stage}.data.path={data / name}.jsonl" for stage, name in DATA.items()),
    ]
    report: dict[str, Any] = {}
    for way in ways:
        own = [f"output={root / way}", *places, *WAYS[way]]
        own += several_budgets(data) if way == "budgets" else []
        report[way] = measure(way, [*own, *options.overrides], data)
        print(way, json.dumps(report[way]), flush=True)
    checks = judged(report)
    report["checks"] = checks
    (root / "benchmark.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, passed in checks.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    return 0 if all(checks.values()) else 1


def measure(way: str, changes: list[str], data: Path) -> dict[str, float]:
    """Train and ask one model: scores in percent, its tokens for a chart, wall seconds and CPU minutes."""
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.run import evaluate
    from mllm.eval.studies.budgets import run_budgets
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    wall, cpu = time.perf_counter(), time.process_time()
    recipe = load_recipe("tiles_demo", changes)
    model, processor = load_model(str(run_recipe(recipe)), device="cpu")
    found = evaluate(
        HFGenerator(model, processor, batch_size=64),
        ["tiles_demo"],
        Path(recipe.output) / "eval",
        data={"tiles_demo": data},
        blind=True,
    )["tiles_demo"]
    asked = {"score": found, "blank": found.blind, "another chart": found.shuffled, "commonest answer": found.prior}
    scores = {name: round(100 * result.score, 1) for name, result in asked.items() if result is not None}
    if way == "budgets":
        study = run_budgets(
            model, processor, ["tiles_demo"], recipe.output, tokens=BUDGETS, data={"tiles_demo": data}, batch_size=64
        )
        scores |= {f"at {row[1]}": row[4] for row in study.tables[0].rows}
    return {
        **scores,
        "tokens": model.config.layout(PICTURE).num_tokens,
        "seconds": round(time.perf_counter() - wall),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
    }


def several_budgets(data: Path) -> list[str]:
    """Changes by which whole charts come at each of `BUDGETS`, a quarter of the rows of an epoch each; close-ups stay as they are."""
    changes = []
    for stage, name in DATA.items():
        if name != "close_ups":
            rows = {"format": "messages", "path": str(data / f"{name}.jsonl")}
            parts = [{"dataset": {**rows, "visual_tokens": most}, "repeat": 1 / len(BUDGETS)} for most in BUDGETS]
            changes.append(f"stages.{stage}.data={json.dumps(parts)}")
    return changes


def judged(report: dict[str, Any]) -> dict[str, bool]:
    """The checks that the measured ways allow."""
    checks = {}
    if {"tiles", "single"} <= report.keys():
        ahead = report["tiles"]["score"] >= report["single"]["score"] + 40
        checks["tiles at least 40 points above the same model without them"] = ahead
    if {"tiles", "native"} <= report.keys():
        checks["native within 3 points of tiles"] = report["native"]["score"] >= report["tiles"]["score"] - 3
        checks["native takes fewer tokens than tiles"] = report["native"]["tokens"] < report["tiles"]["tokens"]
    return checks


if __name__ == "__main__":
    raise SystemExit(main())
