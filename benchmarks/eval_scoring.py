"""How many samples a second does each metric score, how long does a total take, and how long is a benchmark's file?

Made-up replies and targets in each metric's own form, one process, no model. ``score``: one reply; ``total``: everything a report
shows for 5000 samples (parts, interval, clusters), with the cluster bootstrap where a score is no mean.

    python benchmarks/eval_scoring.py            # a table; --json FILE for the numbers
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.metrics import METRICS, build_metric  # noqa: E402
from mllm.eval.report.results import metric_result, score_row  # noqa: E402

WORDS = [
    "red",
    "blue",
    "a",
    "cat",
    "the",
    "dog",
    "chart",
    "3",
    "2014",
    "12.5%",
    "yes",
    "no",
    "left",
    "bar",
    "total",
    "revenue",
    "north",
]
REPLIES = [
    "B",
    "The answer is C.",
    "(A) left",
    "I think that B. right is best",
    "yes",
    "No, there is not.",
    "12.4",
    "1,200",
    "5 %",
]
TABLE = "TITLE | Sales\nyear | north | south\n2010 | 3 | 4.5\n2011 | 7 | {}\n2012 | 9 | 8"


def sample(name: str, number: int, draw: random.Random) -> tuple[Any, Any, dict[str, Any]]:
    """(reply, target, meta) of sample ``number`` in the form that metric ``name`` takes."""
    words = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
    reply = draw.choice([words, draw.choice(REPLIES)])
    category = "abcdef"[number % 6]
    options = [" ".join(draw.choices(WORDS, k=3)) for _ in range(4)]
    meta: dict[str, Any] = {"category": category, "options": options}
    if name.startswith(("vqa_", "textvqa", "stvqa")):
        return reply, [" ".join(draw.choices(WORDS, k=draw.randint(1, 2))) for _ in range(10)], {"category": category}
    if name in ("rms_f1", "rnss"):
        return TABLE.format(draw.randint(1, 9)), [TABLE.format(5)], {}
    if name == "box_iou":
        box = [draw.uniform(0, 0.5), draw.uniform(0, 0.5), draw.uniform(0.5, 1), draw.uniform(0.5, 1)]
        return str([round(edge, 3) for edge in box]), [10.0, 20.0, 400.0, 300.0], {"width": 640, "height": 480}
    if name == "mask_iou":
        return [[draw.random() > 0.5] * 64] * 64, [[k > 20] * 64 for k in range(64)], {}
    if name.startswith("pope"):
        return reply, draw.choice(["yes", "no"]), {"category": ("random", "popular", "adversarial")[number % 3]}
    if name == "mme":
        kind = ("existence", "count", "color")[number // 2 % 3]
        return reply, draw.choice(["yes", "no"]), {"category": kind, "pair": f"{kind}{number // 2}"}
    if name == "amber":
        return reply, draw.choice(["yes", "no"]), {"category": category}
    example = METRICS.get(name).example
    if example is not None and not name.startswith("vsibench"):
        target, given = example
        group = {
            key: f"g{number // 4}"
            for key in ("group", "pair", "set", "figure", "question_pair", "problem")
            if key in given
        }
        turns = {"place": number % 4, "key": ("2steps_1", "2steps_2", "2steps_multi")[number % 3]}
        turns = {key: value for key, value in turns.items() if key in given}
        return reply, target, {"category": category} | dict(given) | group | turns
    if name.startswith("vsibench"):
        kind = draw.choice(["object_counting", "room_size_estimation", "route_planning"])
        return reply, "A" if kind == "route_planning" else "4", {"question_type": kind, "options": options}
    if name == "mathvista":
        kind = draw.choice(["multi_choice", "free_form"])
        target = options[1] if kind == "multi_choice" else "12"
        return (
            reply,
            target,
            {"question_type": kind, "answer_type": "integer", "options": options if kind == "multi_choice" else []},
        )
    if name == "mmbench_circular":
        return reply, "B", {"options": options, "group": f"g{number // 4}", "pass": number % 4}
    if name.startswith("mmmu"):
        kind = draw.choice(["multiple-choice", "multiple-choice", "open"])
        if kind == "open":
            return f"So the result is {reply}.", ["12.5"], {"category": "Art", "question_type": kind}
        return reply, "B", meta | {"category": "Art", "question_type": kind}
    if name.startswith("chartqapro"):
        return reply, ["[3, 'red']"] if draw.random() < 0.3 else [words], {"question_type": "Factoid", "year": ["NO"]}
    if name == "letter_cvbench":
        return (
            reply,
            "(B)",
            meta
            | {
                "category": ("ADE20K", "COCO", "Omni3D")[number % 3],
                "source": ("ADE20K", "COCO", "Omni3D")[number % 3],
            },
        )
    if name.startswith("letter"):
        return reply, "B", meta
    if name in ("count", "count_first"):
        return reply, "3", {"category": category}
    if name == "ocrbench":
        return reply, [words], {"category": category, "dataset": "TextVQA"}
    return reply, [words] if name.startswith("anls") else words, {"category": category}


def build(name: str) -> Any:
    return build_metric({"name": name, "data_range": 255}) if name in ("psnr", "ssim") else build_metric(name)


def measure(name: str, count: int) -> dict[str, Any]:
    """Samples a second and the seconds of a total."""
    metric, draw = build(name), random.Random(0)
    made = [sample(name, number, draw) for number in range(count)]
    for reply, target, meta in made[:20]:
        metric.score(reply, target, meta)
    started = time.process_time()
    for reply, target, meta in made:
        metric.score(reply, target, meta)
    speed = count / (time.process_time() - started)
    rows = []
    for number, (reply, target, meta) in enumerate(made):
        row = {"id": str(number), "target": target, "meta": meta, "cluster": f"c{number // 3}"}
        rows.append(row | {"scores": score_row([metric], reply, target, meta)})
    started = time.process_time()
    result = metric_result(metric, rows)
    return {
        "metric": name, "samples_per_second": round(speed), "total_seconds": round(time.process_time() - started, 3),
        "n": count, "unparsed": result.num_unparsed, "method": result.method,
    }  # fmt: skip


def picture_metrics(seconds: float) -> list[dict[str, Any]]:
    """PSNR and SSIM of 256 × 256 pictures."""
    import numpy as np

    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2))
    rows: list[dict[str, Any]] = []
    for name in ("psnr", "ssim"):
        metric, done = build(name), 0
        metric.score(first, second, {})
        started = time.process_time()
        while time.process_time() - started < seconds:
            metric.score(first, second, {})
            done += 1
        speed = done / (time.process_time() - started)
        row = {"metric": name, "samples_per_second": round(speed), "total_seconds": None, "n": done}
        rows.append(row | {"unparsed": 0, "method": "256 × 256 pixels"})
    return rows


def lines_per_task() -> dict[str, int]:
    """Task → lines of its YAML that are neither empty nor comments."""
    files = sorted((ROOT / "eval/tasks").glob("*.yaml"))
    return {
        path.stem: sum(
            bool(line.strip()) and not line.lstrip().startswith("#") for line in path.read_text().splitlines()
        )
        for path in files
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU seconds spent on each picture metric")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        measure(name, 200 if name == "mask_iou" else arguments.samples)
        for name in METRICS
        if name not in ("psnr", "ssim")
    ]
    rows += picture_metrics(arguments.seconds)
    print(f"{'metric':22} {'samples/s':>10} {'total s':>8} {'n':>6}  interval")
    for row in sorted(rows, key=lambda row: -row["samples_per_second"]):
        total = "–" if row["total_seconds"] is None else f"{row['total_seconds']:.2f}"
        print(f"{row['metric']:22} {row['samples_per_second']:>10,} {total:>8} {row['n']:>6}  {row['method']}")
    lines = lines_per_task()
    order = sorted(lines.values())
    print(
        f"\nlines of a benchmark's YAML: {order[0]} to {order[-1]}, median {order[len(order) // 2]} over {len(order)} tasks"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"metrics": rows, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
