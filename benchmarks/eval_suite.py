"""What does a suite save over its tasks one by one, and what do two processes that share one queue save?

Wall seconds of the command itself, model loading and report included, cold answers every time.

    python benchmarks/eval_suite.py runs/demo/final --data demo_charts=runs/demo/data/charts --data demo_digits=runs/demo/data/digits
    python benchmarks/eval_suite.py CKPT --tasks quick --processes 8
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.task import expand_tasks  # noqa: E402


def seconds(checkpoint: str, tasks: str, processes: int, extra: list[str]) -> float:
    """Of one `mllm eval run` into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "mllm.cli.main",
            "eval",
            "run",
            checkpoint,
            "--tasks",
            tasks,
            "--output",
            folder,
        ]
        started = time.perf_counter()
        subprocess.run(
            [*command, "--processes", str(processes), *extra], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )  # fmt: skip
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tasks", default="demo", help="a suite, or tasks, comma separated")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--data", action="append", default=[], help="task=/folder")
    parser.add_argument("--limit", type=int)
    chosen = parser.parse_args()
    names = expand_tasks(chosen.tasks.split(","))
    shared = ["--limit", str(chosen.limit)] if chosen.limit else []
    print(
        f"{datetime.date.today()} · {os.cpu_count()} CPU cores shared with other work · benchmarks/eval_suite.py, tasks {', '.join(names)}"
        + (f", limit {chosen.limit}" if chosen.limit else "")
    )
    alone = 0.0
    for name in names:
        mine = [word for entry in chosen.data if entry.startswith(f"{name}=") for word in ("--data", entry)]
        spent = seconds(chosen.checkpoint, name, 1, [*mine, *shared])
        alone += spent
        print(f"{name} alone: {spent:.1f} s", flush=True)
    every = [word for entry in chosen.data for word in ("--data", entry)]
    suite = seconds(chosen.checkpoint, chosen.tasks, 1, [*every, *shared])
    print(f"the suite: {suite:.1f} s, {suite / alone:.2f} of the {alone:.1f} s of its tasks one by one", flush=True)
    both = seconds(chosen.checkpoint, chosen.tasks, chosen.processes, [*every, *shared])
    print(f"the suite in {chosen.processes} processes: {both:.1f} s, {both / suite:.2f} of one")


if __name__ == "__main__":
    main()
