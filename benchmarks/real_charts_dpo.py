"""What does a trained reader of charts gain by preferring the charts' numbers to its own wrong ones, and what by the right ones alone?

    python benchmarks/real_charts_dpo.py runs/studies/real_charts/A-0 [--output runs/charts_dpo] [--sections ask,pairs,dpo,sft,report]

ARM is a finished run of `mllm study real_charts`; runs/charts and runs/charts_test are drawn as recipes/real_charts.yaml says. Sections,
each skipped where it is done; expected seconds on one H200 with 430 + 450 steps of 32 rows behind it:
  ask     what the arm says to 6,000 numbers asked of its own training charts (never the benchmark's): 240 s
  pairs   each wrong answer beside the chart's: 5 s
  dpo     recipe real_charts_dpo's third stage, 150 steps of 16 pairs, then the benchmark's questions: 240 s
  sft     the control: the same rows, steps and rates, the loss of the right answer alone: 240 s
  report  both against the arm on the same questions, and against each other: paired by question, bootstrap by tables: 10 s
Needs TRL. Every section prints what it did and its seconds; one that fails ends the script with its exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SECTIONS = ("ask", "pairs", "dpo", "sft", "report")
ALONE = "stages.prefer.options={beta: 0.1, rejected: rejected, trl: {loss_type: [sft], loss_weights: [1.0]}}"
KINDS = "value,difference,two_step"


def mllm(*words: str, log: Path) -> None:
    """Run a command of `mllm`; its words go to ``log`` and, where it fails, the last of them here."""
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "mllm.cli.main", *words], stdout=file, stderr=file, env=dict(os.environ)
        ).returncode
    if code:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]))
        print(f"FAILED mllm {' '.join(words[:3])} (rc {code}); {log}", flush=True)
        sys.exit(code)


def ask(options: argparse.Namespace) -> None:
    """Evaluate the arm on what its training charts ask."""
    log = options.output / "ask.log"
    many = ["--kinds", options.kinds, "--limit", str(options.questions)]
    mllm(
        "data",
        "build",
        "questions",
        str(options.charts),
        "--output",
        str(options.output / "charts_pairs"),
        *many,
        log=log,
    )
    place = f"real_charts={options.output / 'charts_pairs'}"
    to = ["--data", place, "--output", str(options.output / "answers"), *evaluation(options)]
    mllm("eval", "run", str(options.arm / "final"), "--tasks", "real_charts", *to, log=log)
    found = answers(options.output / "answers")
    right = [value for value, _, _ in found.values()]
    print(f"{len(found)} questions of training charts, {100 * sum(right) / len(right):.1f} % right")


def pairs(options: argparse.Namespace) -> None:
    """Make the pairs."""
    folder = options.output / "charts_pairs"
    mllm(
        "data",
        "build",
        "pairs",
        str(options.output / "answers/real_charts.jsonl"),
        str(folder / "test.jsonl"),
        log=options.output / "pairs.log",
    )
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    print(
        f"{len(rows)} pairs of {len({row['image'] for row in rows})} charts: {dict(Counter(row['kind'] for row in rows))}"
    )
    for row in rows[:3]:
        print(f"  {row['question']}  chosen {row['answer']!r}, rejected {row['rejected']!r}")


def prefer(options: argparse.Namespace, name: str, *changes: str) -> None:
    """Train the third stage behind the arm's own and ask the benchmark's questions."""
    folder, log = options.output / f"{name}-0", options.output / f"{name}.log"
    recipe = options.output / "recipe.yaml"
    done = yaml.safe_load((options.arm / "final" / "recipe.yaml").read_text(encoding="utf-8"))
    last = yaml.safe_load(Path("recipes/real_charts_dpo.yaml").read_text(encoding="utf-8"))["stages"][-1]
    data = yaml.safe_load(Path("data/datasets/real_charts_pairs.yaml").read_text(encoding="utf-8"))
    source = {key: data[key] for key in ("format", "columns")}
    last["data"] = source | {"path": str((options.output / "charts_pairs" / "pairs.jsonl").resolve())}
    recipe.write_text(
        yaml.safe_dump(
            done | {"name": "real_charts_dpo", "output": "", "stages": [*done["stages"], last]}, sort_keys=False
        )
    )
    folder.mkdir(exist_ok=True)
    for stage in done["stages"]:
        if not (folder / stage["name"]).exists():
            shutil.copytree(options.arm / stage["name"], folder / stage["name"])
    own = [f"stages.prefer.{change}" for change in options.stage]
    to = ["--output", str(folder), "--resume", "--no-evaluate"]
    mllm("train", str(recipe), f"stages.prefer.steps={options.steps}", *own, *changes, *to, log=log)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in (records[0], records[len(records) // 2], records[-1]):
        told = ("loss", "rewards/margins", "rewards/accuracies", "mean_token_accuracy")
        print(f"  step {record['step']}: " + ", ".join(f"{key} {record[key]:.3f}" for key in told if key in record))
    mllm(
        "eval",
        "run",
        str(folder / "final"),
        "--tasks",
        "real_charts",
        *asked(options),
        "--output",
        str(folder / "eval"),
        log=log,
    )


def report(options: argparse.Namespace) -> None:
    """Print the scores, their differences, and what became of each answer."""
    before = options.arm / "eval"
    if set(answers(before)) != set(answers(options.output / "dpo-0/eval")):  # the arm was asked other questions
        before = options.output / "before-0/eval"
        mllm(
            "eval",
            "run",
            str(options.arm / "final"),
            "--tasks",
            "real_charts",
            *asked(options),
            "--output",
            str(before),
            log=options.output / "before.log",
        )
    study = options.output / "study"
    study.mkdir(exist_ok=True)
    arms = {"before": before.parent, "dpo": options.output / "dpo-0", "sft": options.output / "sft-0"}
    for name, folder in arms.items():
        if (folder / "eval/results.json").is_file() and not (study / f"{name}-0").exists():
            (study / f"{name}-0").symlink_to(folder.resolve(), target_is_directory=True)
    what = {
        "before": "as the arm was trained",
        "dpo": "then dpo and the right answers",
        "sft": "then the right answers alone",
    }
    spec: dict[str, Any] = {
        "description": "Before and after",
        "recipe": "real_charts",
        "task": "real_charts",
        "split_by": "renderer",
    }
    spec |= {"seen": ["matplotlib"], "arms": {name: {"what": words} for name, words in what.items()}}
    path = options.output / "study.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    script = Path(__file__).with_name("real_charts_arms.py")
    for against in ("dpo", "sft"):
        if (study / f"{against}-0").exists():
            print(f"\n== {against} against the others")
            subprocess.run(
                [sys.executable, str(script), str(study), "--study", str(path), "--against", against], check=True
            )
    first = answers(before)
    for name in ("dpo", "sft"):
        if (arms[name] / "eval/results.json").is_file():
            changes: Counter[str] = Counter()
            for key, (value, output, _) in answers(arms[name] / "eval").items():
                was, said, _ = first[key]
                kind = (
                    "said the same"
                    if output == said
                    else "right to wrong"
                    if was > value
                    else "wrong to right"
                    if was < value
                    else "other words, scored the same"
                )
                changes[kind] += 1
            print(f"{name}: of {len(first)} answers {dict(changes.most_common())}")


def answers(folder: Path) -> dict[str, tuple[float, str, str]]:
    """Id → score by the headline metric, what was said, kind; of nothing that was asked, none."""
    found: dict[str, tuple[float, str, str]] = {}
    if not (folder / "results.json").is_file():
        return found
    for line in (folder / "real_charts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "id" in row:
            found[row["id"]] = (
                float(next(iter(row["scores"].values()))["value"] or 0.0),
                row["output"].strip(),
                row["category"],
            )
    return found


def evaluation(options: argparse.Namespace) -> list[str]:
    """As the arm was asked: batches and numbers of another size answer a little otherwise."""
    return ["--batch-size", str(options.batch_size), "--dtype", options.dtype]


def asked(options: argparse.Namespace) -> list[str]:
    """The benchmark's questions, as the arm was asked them."""
    return [*evaluation(options), *(["--limit", str(options.limit)] if options.limit else [])]


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", type=Path, metavar="ARM")
    parser.add_argument("--charts", type=Path, default=Path("runs/charts/train.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("runs/charts_dpo"))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--questions", type=int, default=6000, help="asked of training charts")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=int, default=1200, help="the benchmark's questions; 0: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--stage", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the stage: batch_size=2 num_workers=0"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = {"ask": ask, "pairs": pairs, "report": report}
    for name in options.sections.split(","):
        if name not in SECTIONS:
            parser.error(f"--sections: there is no {name!r}; {', '.join(SECTIONS)}")
        mark = options.output / f"{name}.done"
        if mark.exists() and name != "report":
            print(f"== {name}: done before, {mark.read_text()}", flush=True)
            continue
        print(f"== {name}", flush=True)
        begun = time.perf_counter()
        if name in runs:
            runs[name](options)
        else:
            prefer(options, name, *([ALONE] if name == "sft" else []))
        mark.write_text(f"{time.perf_counter() - begun:.0f} s")
        print(f"OK {name} {mark.read_text()}", flush=True)


if __name__ == "__main__":
    main()
