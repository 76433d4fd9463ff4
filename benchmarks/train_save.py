"""How long does training wait for a checkpoint that is written in the background, and what share is that at one save in ten minutes?

`mllm train` itself with `save_in_background: true`, a Llama of 1.3B and of 3.4B beside two live encoders, AdamW with fp32 copies (12
bytes a weight are saved). The wait of a save is what the step after it takes longer than the steps before; the rest of the writing runs
beside training. The first save also takes the host memory that later ones use again. A 7B's 81 GB of state do not fit twice into a host
of 128 GiB, so that its wait is told from the rate of the copies; section 7b, which needs 256 GiB and 90 GB of disk, times it. A checkpoint
is removed as soon as it is complete: three would fill the disk.

    python benchmarks/train_save.py                                                # one GPU, about 4 minutes; also $OUT/train_save.txt
    python benchmarks/train_save.py --device cpu --patience 6 --sections tiny      # checks the script
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import compiled_in, measure, watch, write_recipe

SECTIONS = {"tiny": 60.0, "1b": 100.0, "3b": 180.0, "7b": 300.0}
EVERY = {"tiny": 8, "1b": 90, "3b": 80, "7b": 110}
"""Steps between two saves: more than a checkpoint takes to be written, else the next save waits for it."""
SAVES = {"tiny": 3, "1b": 3, "3b": 2, "7b": 2}
BYTES_7B = 12 * 6_764_113_920
"""What `mllm train` saves of a 7B and its connector."""


class Removed(threading.Thread):
    """Removes every complete checkpoint of a run and keeps its size and the steps that were done by then, by the step it is of."""

    def __init__(self, run: Path):
        super().__init__(daemon=True)
        self.run_folder, self.found, self.ended = run, dict[int, tuple[int, int]](), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            for path in self.run_folder.glob("checkpoints/sft/step-*/manifest.json"):
                size = sum(file.stat().st_size for file in path.parent.iterdir())
                done = (self.run_folder / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
                self.found[int(path.parent.name.rpartition("-")[2])] = (size, done)
                shutil.rmtree(path.parent)


def run(options: argparse.Namespace, folder: Path, name: str) -> dict:
    cuda, every = options.device == "cuda", EVERY[name]
    recipe = write_recipe(
        folder,
        name,
        name=f"save-{name}",
        steps=every * (SAVES[name] + 2),
        num_workers=6 if cuda else 0,
        compile=cuda,
        save_every=every,
        save_in_background=True,
        log_every=1,
    )
    removed = Removed(folder / f"save-{name}")
    steps = every * (SAVES[name] + 1) - 1
    seen = watch(recipe, steps=steps, limit=SECTIONS[name] * options.patience - 8, **compiled_in(folder))
    removed.ended.set()
    removed.join()
    shutil.rmtree(folder / f"save-{name}", ignore_errors=True)
    seconds = [step["seconds"] for step in seen.steps]
    saves = []
    for at in range(every, len(seconds), every):
        if at not in removed.found:
            continue
        before = median(seconds[at - every // 2 : at])
        after = seconds[at : min(at + every - 1, len(seconds))]
        size, complete = removed.found[at]
        wait = after[0] - before
        saves.append(
            {
                "GB": round(size / 1e9, 2),
                "wait s": round(wait, 3),
                "slower steps after it s": round(sum(s - before for s in after[1:]), 3),
                "GB/s of the copies": round(size / 1e9 / wait, 1) if wait > 0.05 * before else None,
                "share at one in 10 minutes": round(wait / 600, 5),
                "share with the slower steps": round(sum(s - before for s in after) / 600, 5),
                "ms a step before": round(1e3 * before, 1),
                "complete after steps": complete - at,
            }
        )
    if not saves:
        return {"error": "no save", "steps seen": len(seconds), "last lines": [line for _, line in seen.lines[-4:]]}
    rates = [save["GB/s of the copies"] for save in saves[1:] or saves]
    rate = median([r for r in rates if r is not None] or [0.0])  # 0: no wait that stands out
    return {
        "saves": saves,
        "a 7B's wait by this rate s": round(BYTES_7B / 1e9 / rate, 2) if rate else None,
        "a 7B's share at one in 10 minutes": round(BYTES_7B / 1e9 / rate / 600, 5) if rate else None,
        "host memory GB": seen.peak_own_gb,
        "steps seen": len(seconds),
    }


def main() -> None:
    measure(__file__, __doc__, SECTIONS, run, limit=280.0, left_out=lambda name: name in ("tiny", "7b"))


if __name__ == "__main__":
    main()
