"""Does a small model say whether a drawn picture was edited, and is its probability worth what it says?

Draws scenes, edits one thing in each, trains ``recipes/forgery_demo.yaml`` on both, and asks it (`model.probability`, the answer generated)
about pictures that were not trained. The temperature and the threshold are chosen on a validation split; the temperature is written into
the checkpoint, so that it is also served with it. Controls: the same pictures blanked, another picture's, the commonest answer. Writes
``report.json``.

    python benchmarks/forgery_demo.py                      # runs/forgery_demo, two CPU cores; exit code 1 when a check fails
    python benchmarks/forgery_demo.py --seed 1 --output runs/forgery_demo_1      # other weights and other pictures
    python benchmarks/forgery_demo.py --output /tmp/x --train 64 --tests 20 stages.sft.steps=3      # only to try the script

Checks on the test split: at least 25 points above the blanked pictures, a calibration error of at most 5 points after the temperature, and
plain edits found more often than faint ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.forgery import FAINT, PLAIN, QUESTION, WORDS, prepare_forgeries, train_forgery_tokenizer
from mllm.heads.build import keep_in_head
from mllm.heads.probability import best_threshold, calibrate, calibration_error

Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/forgery_demo"))
    parser.add_argument("--train", type=int, default=4000, help="training pictures (default: 4000)")
    parser.add_argument("--tests", type=int, default=1000, help="test pictures; validation has 0.6 times as many")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and pictures (default: 0)")
    options = parser.parse_args()
    began = time.perf_counter()

    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    root = options.output
    counts = {"train": options.train, "validation": 6 * options.tests // 10, "test": options.tests}
    data = prepare_forgeries(root / "data", **counts, seed=options.seed)
    changes = [
        f"seed={options.seed}",
        f"output={root / 'model'}",
        f"model.language_model.tokenizer={train_forgery_tokenizer(root / 'tokenizer')}",
        f"stages.sft.data.path={data / 'train.jsonl'}",
    ]
    checkpoint = run_recipe(load_recipe("forgery_demo", [*changes, *options.overrides]))
    report = {"training_seconds": round(time.perf_counter() - began)} | measure(checkpoint, data)
    report["seconds"] = round(time.perf_counter() - began)
    checks = judged(report)
    (root / "report.json").write_text(json.dumps(report | {"checks": checks}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    for name, passed in checks.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}")
    return 0 if all(checks.values()) else 1


def measure(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Scores on the test split, with the temperature and threshold of the validation split; writes the temperature into the
    checkpoint."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(str(checkpoint)).eval()
    processor = AutoProcessor.from_pretrained(str(checkpoint))
    held, tests = (rows_of(data / f"{name}.jsonl") for name in ("validation", "test"))
    scores, classes = ask(model, processor, held, data)
    temperature = calibrate(scores, classes)
    threshold = best_threshold((scores / temperature).softmax(-1)[:, 1], classes == 1)
    keep_temperature(model, temperature, checkpoint)
    scores, classes = ask(model, processor, tests, data)
    found = {"temperature": round(temperature, 3), "threshold": round(threshold, 3)}
    found |= scored(scores, classes, temperature, threshold)
    found |= by_height(scores, tests, temperature, threshold)
    for name, changed in (("blank", blanked(tests)), ("another picture", shuffled(tests))):
        other, _ = ask(model, processor, changed, data)
        found[name] = {"accuracy": scored(other, classes, temperature, threshold)["accuracy"]}
    share = float((classes == 1).double().mean())
    return found | {"commonest answer": {"accuracy": round(100 * max(share, 1 - share), 1)}}


def ask(model: Any, processor: Any, rows: Rows, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(N, 2)`` of real and fake, and what is right ``(N,)``. An answer without the phrase says nothing: equal logits."""
    scores = []
    for start in range(0, len(rows), 50):
        pictures = [
            row["image"] if isinstance(row["image"], Image.Image) else str(data / row["image"])
            for row in rows[start : start + 50]
        ]
        found = model.probability(pictures, QUESTION, processor=processor, max_new_tokens=48)
        scores += [torch.zeros(2) if answer.scores is None else answer.scores.float().cpu() for answer in found]
    return torch.stack(scores), torch.tensor([WORDS.index(row["answer"]) for row in rows])


def scored(scores: torch.Tensor, classes: torch.Tensor, temperature: float, threshold: float) -> dict[str, float]:
    """In percent: accuracy at the threshold, area under the ROC curve, calibration error without and with the temperature, and
    answers without a verdict."""
    probabilities = (scores / temperature).softmax(-1)
    fake = probabilities[:, 1]
    right = (fake >= threshold) == (classes == 1)
    pairs = fake[classes == 1][:, None] - fake[classes == 0][None]
    area = (pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean()
    return {
        "accuracy": round(100 * float(right.double().mean()), 1),
        "roc_area": round(100 * float(area), 1),
        "calibration_error_raw": round(100 * calibration_error(scores.softmax(-1), classes), 1),
        "calibration_error": round(100 * calibration_error(probabilities, classes), 1),
        "without_verdict": round(100 * float((scores == 0).all(1).double().mean()), 1),
    }


def by_height(scores: torch.Tensor, rows: Rows, temperature: float, threshold: float) -> dict[str, Any]:
    """Share of edits that were found, in percent, and the mean probability given to them, from faint to plain."""
    fake = (scores / temperature).softmax(-1)[:, 1]
    heights = torch.tensor([row["height"] for row in rows])
    edges = torch.linspace(FAINT, PLAIN, 5).tolist()
    found = {}
    for low, high in itertools.pairwise(edges):
        inside = (heights >= low) & (heights < high) & torch.tensor([row["answer"] == "fake" for row in rows])
        if bool(inside.any()):
            share, mean = (fake[inside] >= threshold).double().mean(), fake[inside].double().mean()
            found[f"{low:g} to {high:g}"] = {"found": round(100 * float(share), 1), "mean": round(float(mean), 3)}
    return {"edits": found}


def blanked(rows: Rows) -> Rows:
    """The rows with a grey picture each."""
    return [{**row, "image": Image.new("RGB", (64, 64), (128, 128, 128))} for row in rows]


def shuffled(rows: Rows) -> Rows:
    """The rows with another scene's picture, which every second scene has edited where its own is not."""
    found = []
    for number, row in enumerate(rows):
        other = number ^ (number // 2 % 2)  # a scene and its edit stand side by side
        found.append({**row, "image": rows[(other + len(rows) // 4 * 2) % len(rows)]["image"]})
    return found


def keep_temperature(model: Any, temperature: float, checkpoint: Path) -> None:
    """Write the calibration into the checkpoint's config, which `probability` and `mllm serve` read."""
    name = next(name for name, head in model.config.heads.items() if head["type"] == "probability")
    keep_in_head(checkpoint, name, calibration=temperature)


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judged(report: dict[str, Any]) -> dict[str, bool]:
    """The checks, by what they say."""
    edits = list(report["edits"].values())
    return {
        "25 points above blank pictures": report["accuracy"] >= report["blank"]["accuracy"] + 25,
        "calibration error at most 5 points": report["calibration_error"] <= 5,
        "plain edits found more often than faint ones": edits[-1]["found"] > edits[0]["found"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
