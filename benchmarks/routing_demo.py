"""Does routing pay? Draws three kinds of pictures, trains experts and router from scratch, and checks what was promised.

    python benchmarks/routing_demo.py                       # 2 CPU cores, at most 15 minutes; exit code 1 when a check fails
    python benchmarks/routing_demo.py --output /tmp/x --pictures 60 --tests 20 stages.0.epochs=1     # only to try the script

Checks on held-out pictures: the router runs the right expert and no other for at least 95 %; the routed score is at least 5 points
above the best single expert's and within 1 point of running all experts; at most 1.2 experts run per picture. The table of scores
and costs goes into the model card; everything, with both recipes' settings, into ``<output>/routing/benchmark.json``.
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

SINGLE = {
    "picture": {
        "type": "timm",
        "architecture": "resnet10t",
        "options": {"channels": [32, 64, 96, 96], "norm_layer": "groupnorm1"},
        "image_size": 80,
        "layers": [-2],
        "resize": "squash",
    }
}
"""The compute-matched model without routing: one encoder for all kinds, of about the operations that base encoder and one expert
take on average."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/routed_demo"))
    parser.add_argument("--pictures", type=int, default=1500, help="training pictures of each kind")
    parser.add_argument("--tests", type=int, default=200, help="held-out pictures of each kind")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the single-encoder model")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    options = parser.parse_args()
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from mllm.cli.route_scores import score_routings
    from mllm.data.routing_labels import open_sources
    from mllm.demo.routing import EXPERT_OF, prepare_routing_demo, train_routing_tokenizer
    from mllm.eval.checkpoint import load_model
    from mllm.train.run import run_recipe
    from mllm.train.stages.routing.report import routing_report

    root = options.output
    data = prepare_routing_demo(root / "data", num_train=options.pictures, num_test=options.tests)
    tokenizer = train_routing_tokenizer(data, root / "tokenizer")
    drawn = time.perf_counter()
    final = run_recipe(_recipe(root, data.train, tokenizer, options.overrides), resume=options.resume)
    trained = time.perf_counter()
    baseline = None
    if not options.no_baseline:
        baseline = run_recipe(_baseline(root, data.train, tokenizer, options.overrides), resume=options.resume)
    compared = time.perf_counter()

    model, processor = load_model(str(final), device="cpu")
    sources = open_sources({"format": "messages", "path": str(data.test), "name": "routed_demo"})
    report = routing_report(model, processor, sources, batch_size=64)
    folder = root / "routing"
    folder.mkdir(parents=True, exist_ok=True)
    scores = score_routings(
        model,
        processor,
        [_task(root)],
        folder,
        report=report,
        limit=None,
        batch_size=64,
        baseline=str(baseline) if baseline else None,
        card=final,
        dtype="float32",
        device="cpu",
    )
    right = sum(row.experts == (EXPERT_OF[row.kind],) for row in report.rows) / len(report.rows)
    by_name = {entry["name"]: entry for entry in scores}
    best = max((entry for name, entry in by_name.items() if name.endswith(" alone")), key=lambda entry: entry["mean"])
    routed, everything = by_name["routed"], by_name["all experts"]
    checks = {
        "right expert at least 95 %": (100 * right, right >= 0.95),
        "routed at least 5 points above the best single expert": (
            routed["mean"] - best["mean"],
            routed["mean"] >= best["mean"] + 5,
        ),
        "routed within 1 point of all experts": (
            routed["mean"] - everything["mean"],
            routed["mean"] >= everything["mean"] - 1,
        ),
        "experts per picture at most 1.2": (routed["experts"], routed["experts"] <= 1.2),
    }
    seconds = {
        "data": drawn - started,
        "training": trained - drawn,
        "single encoder": compared - trained,
        "evaluation": time.perf_counter() - compared,
        "total": time.perf_counter() - started,
    }
    result: dict[str, Any] = {
        "checks": {name: {"value": value, "passed": passed} for name, (value, passed) in checks.items()},
        "scores": scores,
        "routing": report.as_dict(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (folder / "benchmark.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, (value, passed) in checks.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}: {value:.2f}")
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(folder / "benchmark.json")
    return 0 if all(passed for _, passed in checks.values()) else 1


def _recipe(root: Path, train: Path, tokenizer: Path, overrides: list[str]) -> Any:
    from mllm.recipe import load_recipe

    places = [
        f"output={root}",
        f"model.language_model.tokenizer={tokenizer}",
        f"stages.specialise.data.path={train.with_name('specialise.jsonl')}",
        f"stages.experts.data.path={train}",
        f"stages.route.data.dataset.path={train}",
    ]
    return load_recipe("routed_demo", [*places, *overrides])


def _baseline(root: Path, train: Path, tokenizer: Path, overrides: list[str]) -> Any:
    """The same language model, data and stage, one encoder in place of four."""
    recipe = _recipe(root, train, tokenizer, overrides)
    changes = {"encoders": SINGLE, "router": None, "connector": {"type": "mlp"}}
    return recipe.model_copy(
        update={
            "name": "routed_demo_single",
            "output": str(root / "single"),
            "model": recipe.model.model_copy(update=changes),
            "stages": recipe.stages[:2],
        }
    )


def _task(root: Path) -> str:
    """The task over this output folder's data."""
    from mllm import assets
    from mllm.config import read_yaml

    task = read_yaml(assets.find("eval/tasks", "routed_demo", kind="task"))
    path = root / "data" / "routed_demo.yaml"
    path.write_text(json.dumps({**task, "data_dir": str((root / "data").resolve())}), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
