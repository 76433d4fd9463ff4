"""Does a run killed at any moment go on bit-equal? Random settings, random kills, compared with the run that was left alone.

Each trial draws its settings (stages, precision, packing, workers, accumulation, a weighted mixture, engine and processes), trains them
once whole, and once killed (SIGKILL) up to four times: before the N-th file operation of a process, or after a random time. Losses,
gradient norms, rates, sample checksums and the bytes of the final weights must be equal. One JSON line a trial; exit code 1 when any
differs.

    python benchmarks/train_kill.py --minutes 10 --seed 1 --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ENGINES = {1: ("none", "none", "zero2"), 2: ("none", "zero1", "zero2", "zero3", "zero2", "zero3")}


def settings(folder: Path, chance: random.Random, processes: int) -> Any:
    """A recipe of one to three short stages."""
    from tests.integration.kill_points import plugin
    from tests.integration.train_helpers import make_recipe, write_data

    paths = [
        write_data(folder / "data", rows=16),
        write_data(folder / "data", rows=10, name="other", text_only_every=2),
    ]
    sets = [{"dataset": {"format": "llava", "path": str(p)}, "weight": w} for p, w in zip(paths, (3, 1))]
    stages = []
    for number in range(chance.choice((1, 2, 2, 3))):
        rows = chance.choice(("plain", "packing", "group_by_length"))
        part = chance.choice(("language_model", "language_model", "lora"))
        stage: dict[str, Any] = {
            "name": f"stage{number}",
            "data": chance.choice((sets[0]["dataset"], {"datasets": sets, "epoch_size": 16})),
            "epochs": chance.choice((1, 2, 2.5)),
            "batch_size": chance.choice((1, 2)),
            "gradient_accumulation": chance.choice((1, 2, 3)),
            "num_workers": chance.choice((0, 0, 1, 2)),
            "save_every": chance.choice((1, 2, 3, None)),
            "dtype": chance.choice(("float32", "bfloat16")),
            "engine": chance.choice(ENGINES[processes]),
            "gradient_checkpointing": chance.random() < 0.2,
            "optimizer": {"weight_decay": 0.1, "type": "adamw"},
            "learn": {
                "language_model": {"lr": 1e-3, "lora": {"r": 2, "dropout": 0.1}} if part == "lora" else 1e-3,
                "connector": 3e-3,
                **({"encoders": 1e-4} if chance.random() < 0.5 else {}),
            },
        }
        if rows != "plain":
            stage[rows] = True
        if stage["engine"] == "none" and chance.random() < 0.4:
            stage["optimizer"] |= chance.choice(({"type": "muon"}, {"ema": 0.9}))
        stages.append(stage)
    recipe = make_recipe(folder, stages=stages)
    recipe.plugins = [plugin(folder)]
    return recipe


def _train(recipe: Any, output: Path, resume: bool, processes: int) -> None:
    from mllm.train import run_recipe

    log = os.open(output.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_recipe(recipe, output=output, resume=resume, processes=processes)


def start(recipe: Any, output: Path, *, resume: bool, processes: int, kill_after: float | None = None) -> int:
    """Train in processes forked from a server that has imported everything; the exit code. kill_after: seconds."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mllm.models.build", "mllm.train.run"])
    child = context.Process(target=_train, args=(recipe, output, resume, processes))
    child.start()
    timer = None
    if kill_after is not None:
        timer = threading.Timer(kill_after, lambda: child.is_alive() and os.kill(child.pid, signal.SIGKILL))
        timer.start()
    child.join(300)
    if timer is not None:
        timer.cancel()
    if child.is_alive():
        child.kill()
        raise RuntimeError("a run hung for 300 s")
    return child.exitcode


def trial(chance: random.Random, processes: int) -> dict[str, Any]:
    from tests.integration.kill_points import aim, spare
    from tests.integration.train_helpers import metrics

    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        recipe = settings(folder, chance, processes)
        spare(folder)
        began = time.monotonic()
        code = start(recipe, folder / "whole", resume=False, processes=processes)
        wall = time.monotonic() - began
        shown = [
            "{engine} {dtype} acc{gradient_accumulation} w{num_workers} {kind}".format(
                **stage.model_dump(exclude={"kind"}),
                kind="packed" if stage.packing else "grouped" if stage.group_by_length else "plain",
            )
            for stage in recipe.stages
        ]
        result: dict[str, Any] = {"stages": shown, "kills": [], "starts": 0}
        if code:
            return {**result, "equal": False, "why": f"the whole run failed: {(folder / 'log.txt').read_text()[-600:]}"}
        wanted, output = metrics(folder / "whole"), folder / "killed"
        for number in range(chance.choice((2, 3, 4))):
            result["starts"] += 1
            spare(folder)
            after = None
            if chance.random() < 0.7:
                after_files = chance.randrange(3, 150 if processes == 1 else 110)
                pattern, rank = chance.choice(("writing-", "deleting-", ".")), chance.randrange(processes)
                after_files = after_files if pattern == "." else chance.randrange(14)
                aim(folder, output, pattern, after=after_files, half=False, process=rank)
            else:
                after = chance.uniform(0.2, 0.9) * wall
            before = len(metrics(output)) if (output / "metrics.jsonl").is_file() else 0
            code = start(recipe, output, resume=number > 0, processes=processes, kill_after=after)
            if (output / "final").is_dir():
                break
            where = f"{pattern}+{after_files} rank {rank}" if after is None else f"{after:.1f} s"
            result["kills"].append(f"{where} (logged {before} → {len(_metrics(output))})")
        spare(folder)
        result["starts"] += 1
        code = start(recipe, output, resume=True, processes=processes)
        if code:
            return {**result, "equal": False, "why": (folder / "log.txt").read_text()[-800:]}
        found = metrics(output)
        same = {
            path.name: path.read_bytes() == (folder / "whole" / "final" / path.name).read_bytes()
            for path in (output / "final").glob("*.safetensors")
        }
        first = next((a for a, b in zip(found, wanted) if a != b), None)
        left = [str(p.relative_to(output)) for p in output.rglob(".*")]
        equal = found == wanted and all(same.values()) and not left
        return {**result, "steps": len(wanted), "equal": equal, **({} if equal else {"why": str((first, same, left))})}


def _metrics(output: Path) -> list:
    path = output / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    options = parser.parse_args()
    import torch
    import transformers

    print(
        json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, **vars(options)}), flush=True
    )
    end, number, kills, failed = time.monotonic() + 60 * options.minutes, 0, 0, 0
    while time.monotonic() < end:
        result = trial(random.Random(f"{options.seed}/{number}"), options.processes)
        kills, failed, number = kills + len(result["kills"]), failed + (not result["equal"]), number + 1
        print(json.dumps(result, ensure_ascii=False), flush=True)
    print(json.dumps({"trials": number, "kills": kills, "not equal": failed}), flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
