"""How much memory does an evaluation of a million answers take, and does its report open?

Made-up questions without pictures and a generator that answers by a rule, through everything that `mllm eval run` does: reading
the data, asking, one line an answer, scores with intervals, joining the shares of processes, the report. Each line of the table is a
process of its own; its memory is the most that the operating system ever counted (ru_maxrss), less that after the imports.

    python benchmarks/eval_million.py                        # 20 tasks of 50,000, and one of 1,000,000
    python benchmarks/eval_million.py --runs 4x2500,1x10000  # a short one
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.report.show import write_report  # noqa: E402
from mllm.eval.run import evaluate  # noqa: E402
from mllm.types import Request, Response  # noqa: E402

TASK = """version: 1
description: Sums that nobody needs
sources:
  - name: made
    format: jsonl
    files: [test.jsonl]
    columns: {id: id, question: question, answers: answer, images: "[]", category: kind}
prompt: "{{ question }}"
metrics: [exact_match, relaxed_strict]
"""


class Rule:
    """Answers two of three sums, declines some."""

    name = "rule"

    def fingerprint(self) -> str:
        return "rule"

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        for request in requests:
            text = request.turns[-1].content
            first, _, second = text.removeprefix("How much is ").partition(" + ")
            total = int(first) + int(second.partition("?")[0])
            reply = str(total) if total % 3 else "I'm sorry, I can't add that." if total % 2 else f"about {total + 1}"
            yield Response(request.id, reply, text, 20, 3, logprob=-0.4)


def write_data(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    filler = "a sum among many others, told at some length so that a line is as long as those of real benchmarks, " * 3
    with (folder / "test.jsonl").open("w") as handle:
        for k in range(count):
            row = {"id": f"{k}", "question": f"How much is {k} + {k % 97}? ({filler})", "answer": str(k + k % 97)}
            handle.write(json.dumps(row | {"kind": f"kind {k % 12}"}) + "\n")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(tasks: int, rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = [f"sums{k}" for k in range(tasks)]
        for name in names:
            (folder / f"{name}.yaml").write_text(TASK)
            write_data(folder / "data" / name, rows)
        data = {name: folder / "data" / name for name in names}
        paths = [str(folder / f"{name}.yaml") for name in names]
        before, started = peak(), time.perf_counter()
        results = evaluate(Rule(), paths, folder / "o", data=data, progress=False)
        asked, middle = peak(), time.perf_counter()
        write_report(results, folder / "o", show=False)
        reported, ended = peak(), time.perf_counter()
        pages = list((folder / "o/report").glob("*.html"))
        lines = sum(path.stat().st_size for path in (folder / "o").glob("*.jsonl"))
        assert sum(result.num_samples for result in results.values()) == tasks * rows
        return {
            "tasks": tasks, "rows": rows, "start_mb": before, "asking_mb": asked - before, "with_report_mb": reported - before,
            "asking_s": middle - started, "report_s": ended - middle, "predictions_mb": lines / 2**20,
            "front_kb": (folder / "o/report.html").stat().st_size / 1024, "pages": len(pages),
            "largest_page_kb": max((page.stat().st_size for page in pages), default=0) / 1024,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="1x50000,20x50000,1x1000000", help="TASKSxROWS, comma separated")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*map(int, chosen.one.split("x")))))
        return
    print(
        f"{datetime.date.today()} · Python {sys.version.split()[0]} · {os.cpu_count()} CPU cores shared with other work · "
        "benchmarks/eval_million.py"
    )
    print(
        "tasks      rows  predictions MB  memory MB: asking  with report  seconds: asking  report  front page KB  pages  largest KB"
    )
    for run in chosen.runs.split(","):
        command = [sys.executable, __file__, "--one", run]
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        m = json.loads(found.stdout.splitlines()[-1])
        print(
            f"{m['tasks']:5d} {m['rows']:9,} {m['predictions_mb']:15.0f} {m['asking_mb']:18.0f} {m['with_report_mb']:12.0f} "
            f"{m['asking_s']:16.0f} {m['report_s']:7.0f} {m['front_kb']:14.0f} {m['pages']:6d} {m['largest_page_kb']:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
