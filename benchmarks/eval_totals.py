"""How much CPU do totals that are no means take of many answers, intervals included, and how much memory?

Made-up scored rows, told one after another to what `mllm eval run` sums up with; each line of the table is a process of its own, its memory
the most that the operating system ever counted (ru_maxrss), less that before the first row.

    python benchmarks/eval_totals.py                    # 100,000 and 1,000,000 answers
    python benchmarks/eval_totals.py --rows 60000       # a short one
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.metrics import build_metric  # noqa: E402
from mllm.eval.report.results import summarise  # noqa: E402

KINDS = {
    "pope_official": "yes_no", "amber": "yes_no", "hallusionbench": "yes_no", "mme": "yes_no", "naturalbench": "yes_no",
    "chartbench": "yes_no", "letter_groups": "letter", "mmbench_circular": "letter", "wemath": "letter", "mask_iou": "mask",
    "mmfr": "forged",
}  # fmt: skip
_STEPS = ("2steps_1", "2steps_2", "2steps_multi")


def rows(name: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows as a prediction file of that rule has them, about 70 % right."""
    dice = random.Random(0)
    metric = build_metric(name)
    kind = KINDS[name]
    for k in range(count):
        meta: dict[str, Any] = {
            "category": f"kind {k // 12 % 12}",
            "options": [f"thing {k}", f"thing {k + 1}", "both", "none"],
        }
        meta |= {"group": k // 4, "place": k % 4, "pass": k % 4, "pair": k // 2, "set": k // 6, "figure": k // 3}
        meta |= {
            "question_pair": k // 2,
            "kind": "Acc+",
            "chart": f"chart {k % 9}",
            "problem": k // 3,
            "key": _STEPS[k % 3],
        }
        right = dice.random() < 0.7
        target: Any = "yes" if k % 2 else "no"
        said = target if right else ("no" if k % 2 else "yes")
        score: dict[str, Any] = {
            "value": float(right),
            "extracted": said,
            "rule": "word",
            "parts": {"said_yes": float(said == "yes")},
        }
        if kind == "letter":
            target, score["extracted"], score["parts"] = "A", "A" if right else "B", {}
        elif kind == "mask":
            inside = dice.random() * 1000
            score |= {"value": inside / 1000, "parts": {"intersection": inside, "union": 1000.0, "dice": inside / 1000}}
            score["parts"] |= {"no_target": 0.0, "no_mask": 0.0}
        elif kind == "forged":
            target = "fake" if k % 2 else "real"
            score |= {
                "extracted": target if right else "fake",
                "parts": {"bleu_1": dice.random(), "rouge_l": dice.random()},
            }
        yield {
            "id": f"sample-{k}", "question": "", "output": str(said), "target": target, "meta": meta, "category": meta["category"],
            "scores": {metric.label: score}, "logprob": -dice.random(),
        }  # fmt: skip


def measure(name: str, count: int) -> dict[str, Any]:
    header = {"identity": {"task": name, "version": 1, "data": "", "generation": {}}, "task": {}}
    metric = build_metric(name)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for _ in rows(name, count):
        pass
    making, began = time.process_time() - began, time.process_time()
    result = summarise(rows(name, count), [metric], header)
    seconds = time.process_time() - began - making
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    headline = result.metrics[0]
    return {
        "seconds": seconds,
        "memory": memory,
        "value": headline.value,
        "low": headline.low,
        "method": headline.method,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--rules", default=",".join(KINDS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child[0], int(given.child[1]))))
        return
    print(f"{datetime.date.today()} · Python {sys.version.split()[0]} · benchmarks/eval_totals.py")
    print(f"{'rule':<18}{'answers':>11}{'seconds':>9}{'memory MB':>11}{'value':>9}{'± 95 %':>8}  method")
    for count in map(int, given.rows.split(",")):
        for name in given.rules.split(","):
            command = [sys.executable, __file__, "--child", name, str(count)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            half = found["value"] - found["low"]
            told = (
                f"{found['seconds']:>9.1f}{found['memory']:>11.0f}{found['value']:>9.2f}{half:>8.3f}  {found['method']}"
            )
            print(f"{name:<18}{count:>11,}{told}", flush=True)


if __name__ == "__main__":
    main()
