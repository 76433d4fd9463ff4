"""Does one small model mark what a phrase names, and still answer in words?

Draws the scenes of `mllm.demo.scenes`, trains ``recipes/segmentation_demo.yaml`` and two controls with as many steps: one that is
never told the phrase, one without the segmentation head. Scores masks on scenes and phrases that were not trained, with the answer
generated, and text answers of both. Writes ``report.json``.

    python benchmarks/segmentation_demo.py                # runs/segmentation_demo, two CPU cores
    python benchmarks/segmentation_demo.py --score runs/studies/segmentation_demo/marks-0/final     # of a model that is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.scenes import ASKED_FOR_NOTHING, BLIND, prepare_scenes, train_text_tokenizer
from mllm.eval.metrics import Scored, build_metric
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt
from mllm.processing.mask_files import decode_rle
from mllm.processing.processor import MllmProcessor
from mllm.recipe import load_recipe
from mllm.train.run import run_recipe
from mllm.types import IMAGE_MARK, Turn

DEFAULT_OUTPUT = Path("runs/segmentation_demo")
WORDS = [
    "model.heads={}",
    "stages.sft.learn={encoders: 1.5e-3, connector: 1.5e-3, language_model: 5.0e-4}",
    "stages.unknown.learn={encoders: 2.0e-4, connector: 2.0e-4, language_model: 4.0e-4}",
]
CONTROLS = {"marks": ("train", []), "blind": ("blind", []), "words": ("words", WORDS)}
"""Model → its training file, and changes of the recipe."""
STAGES = {"sft": "", "unknown": "_unknown"}
"""Stage → which of the files."""


def rows_of(output: Path, file: str) -> dict[str, Any]:
    """A stage's data."""
    path = str(output / "data" / f"{file}.jsonl")
    dataset = {"name": f"scenes_{file}", "format": "messages", "path": path, "licence": "Apache-2.0"}
    return {"datasets": [{"dataset": dataset}]}


def train(output: Path, name: str, steps: int | None, seed: int, more: list[str], resume: bool) -> Path:
    """Train one of the three models; returns its checkpoint."""
    file, changes = CONTROLS[name]
    overrides = [
        f"model.language_model.tokenizer={output / 'text_tokenizer'}",
        *(f"stages.{stage}.data={json.dumps(rows_of(output, file + kind))}" for stage, kind in STAGES.items()),
        f"seed={seed}",
        *changes,
        *([f"stages.sft.steps={steps}"] if steps else []),
        *more,
    ]
    return run_recipe(load_recipe("segmentation_demo", overrides), output=output / name, resume=resume)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score_masks(checkpoint: Path, data: Path, *, blind: bool = False) -> dict[str, float]:
    """cIoU, gIoU, N-acc … of generated answers on unseen scenes and phrases."""
    model, processor = opened(checkpoint)
    metric, items, tests = build_metric("mask_iou"), [], rows(data / "marks_test.jsonl")
    for start in range(0, len(tests), 50):
        part = tests[start : start + 50]
        phrases = [BLIND if blind else row["phrase"] for row in part]
        found = model.segment(
            [str(data / row["image"]) for row in part], phrases, processor=processor, max_new_tokens=16
        )
        for number, (row, answer) in enumerate(zip(part, found)):
            empty = torch.zeros(answer.masks.shape[1:], dtype=torch.bool).numpy()
            target = empty if row["mask"] is None else decode_rle(row["mask"])
            items.append(Scored(f"{start + number}", metric.score(answer.union.numpy(), target, {}), None))
    totals = metric.aggregate(items)
    there = [item.value for item in items if not item.score.parts["no_target"]]
    return {**totals, "giou_of_targets": 100 * sum(there) / len(there), "samples": len(items)}


def score_unknown(checkpoint: Path, data: Path) -> dict[str, float]:
    """Requests for what no scene can show, of words that were not trained: how many mark anything, and how many answers say that there
    is none; of the four phrases of `ASKED_FOR_NOTHING` and of all others."""
    model, processor = opened(checkpoint)
    tests, found = rows(data / "unknown_test.jsonl"), []
    for start in range(0, len(tests), 60):
        part = tests[start : start + 60]
        pictures = [str(data / row["image"]) for row in part]
        found += model.segment(pictures, [row["phrase"] for row in part], processor=processor, max_new_tokens=16)
    counts: dict[str, float] = {}
    for row, answer in zip(tests, found):
        kind = "unknown_named" if row["phrase"] in ASKED_FOR_NOTHING else "unknown_others"
        for name, one in (
            ("", 1),
            ("_marked", bool(answer.masks.any())),
            ("_said", "none" in answer.text),
        ):
            counts[kind + name] = counts.get(kind + name, 0) + one
        if answer.masks.any() or "none" not in answer.text:
            print(f"  {row['phrase']}: {answer.text}")
    return counts


@torch.no_grad()
def score_words(checkpoint: Path, data: Path) -> float:
    """Share of questions about unseen scenes that are answered exactly, in percent."""
    model, processor = opened(checkpoint)
    tests, right = rows(data / "questions_test.jsonl"), 0
    for start in range(0, len(tests), 50):
        part = tests[start : start + 50]
        texts = [render_prompt(processor, [Turn("user", f"{IMAGE_MARK}\n{row['question']}")]) for row in part]
        images = [[str(data / row["image"])] for row in part]
        inputs = processor(text=texts, images=images, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == row["answer"] for answer, row in zip(answers, part))
    return 100 * right / len(tests)


def scores(checkpoint: Path, data: Path, name: str) -> dict[str, float]:
    """All that is scored of one of the three models."""
    found = score_unknown(checkpoint, data) if name == "marks" else {}
    if name != "words":
        found |= {k: round(v, 2) for k, v in score_masks(checkpoint, data, blind=name == "blind").items()}
    return found | {"words_right": round(score_words(checkpoint, data), 2)}


def opened(checkpoint: Path) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MllmForConditionalGeneration.from_pretrained(str(checkpoint)).eval().to(device)
    return model, MllmProcessor.from_pretrained(str(checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--steps", type=int, help="optimizer steps of each model (default: the recipe's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order of samples; scenes stay (default: 0)"
    )
    parser.add_argument(
        "--confusing",
        type=float,
        default=0.5,
        help="share of training scenes where a name needs both words (default: 0.5)",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="draw the scenes and train the text tokenizer, nothing else"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with models that are there; finished stages are kept"
    )
    parser.add_argument("--score", type=Path, metavar="CHECKPOINT", help="train nothing, score this model with a head")
    parser.add_argument("--models", nargs="+", choices=list(CONTROLS), default=list(CONTROLS))
    arguments = parser.parse_args()
    output, began = arguments.output, time.time()
    data = prepare_scenes(output / "data", confusing=arguments.confusing)
    train_text_tokenizer(output / "text_tokenizer")
    if arguments.prepare:
        return
    if arguments.score is not None:
        print(json.dumps(scores(arguments.score, data, "marks")))
        return
    report: dict[str, Any] = {}
    for name in arguments.models:
        start = time.time()
        checkpoint = train(output, name, arguments.steps, arguments.seed, arguments.overrides, arguments.resume)
        report[name] = {"training_seconds": round(time.time() - start)}
        report[name] |= scores(checkpoint, data, name)
        print(name, json.dumps(report[name]), flush=True)
    report["seconds"] = round(time.time() - began)
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
