"""What does the training loop cost beside a bare torch loop on the same model and batches, and how soon does it start?

Bare: forward, backward, clipping, AdamW on batches made beforehand. Ours: everything between the end of one optimizer step and the end
of the next: the data pipeline (two workers), counting, NaN and spike guards, loss by dataset, per-part norms, logging. Both take their
steps in turn, on the same batches, in one process, so that a busy machine slows both. Prints JSON lines; the goal is an overhead
below 5 %.

    python benchmarks/train_loop.py                            # small models on the CPU
    python benchmarks/train_loop.py --width 2048 --layers 16   # one larger model, on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def clocks() -> tuple[float, float]:
    """(wall, CPU seconds of this process)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def recipe(folder: Path, width: int, layers: int, steps: int):
    from tests.integration.train_helpers import LLM, make_recipe

    text = {
        **LLM,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, width // 64),
        "num_key_value_heads": max(2, width // 64),
        "attention_dropout": 0.0,
    }
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    stage = {"name": "sft", "steps": steps, "batch_size": 4, "dtype": dtype, "num_workers": 2, "log_every": 10}
    made = make_recipe(folder, stages=[stage], rows=64)
    made.model.language_model.config = text
    return made


class BareLoop:
    """The same model and optimizer, and nothing else."""

    def __init__(self, made):
        from mllm.train.engine.groups import apply_learning, set_modes
        from mllm.train.prepare import prepare_model
        from mllm.train.start import start_model

        stage = made.stages[0]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, _ = start_model(made, stage, None)
        apply_learning(self.model, stage)
        set_modes(self.model)
        prepare_model(self.model, stage, device=self.device, zero_stage=0)
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=True)

    def step(self, batch) -> None:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        self.model(**inputs, use_cache=False, skip_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def in_turn(made, folder: Path) -> tuple[list, list, list]:
    """(wall, CPU) of every step of the bare loop, of ours from the end of one step to the end of the next, and of that
    what lies between steps: batches from the workers, records, guards."""
    from mllm.train import run_recipe, trainer

    bare, times, ours, between = BareLoop(made), [], [], []
    step, last = trainer.optimizer_step, [clocks()]

    def timed(engine, micro, *arguments, **options):
        fetched = clocks()
        bare.step(micro[0])
        began = clocks()
        times.append([b - a for a, b in zip(fetched, began)])
        between.append([f - p for p, f in zip(last[0], fetched)])
        result = step(engine, micro, *arguments, **options)
        now = clocks()
        ours.append([f - p + n - b for p, f, b, n in zip(last[0], fetched, began, now)])
        last[0] = now
        return result

    trainer.optimizer_step = timed
    try:
        run_recipe(made, output=folder / "run")
    finally:
        trainer.optimizer_step = step
    return times, ours, between


def start_up(folder: Path, made) -> dict[str, list[float]]:
    """[wall, CPU] seconds of starting things in a fresh process; first step: of `mllm train` until it is logged."""
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    command = [sys.executable, "-m", "mllm.cli.main"]
    cases = {
        "import torch, transformers' Llama": [
            sys.executable,
            "-c",
            "import torch, transformers; transformers.LlamaForCausalLM, transformers.CLIPVisionModel",
        ],
        "import mllm": [sys.executable, "-c", "import mllm"],
        "mllm --help": [*command, "--help"],
        "mllm train, first step logged": [*command, "train", str(path), "--output", str(folder / "first")],
    }
    result = {}
    for name, arguments in cases.items():
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        file = folder / "first" / "metrics.jsonl"
        while child.poll() is None and not ("train" in name and file.is_file() and file.stat().st_size):
            time.sleep(0.01)
        wall = time.perf_counter() - began
        child.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result[name] = [round(wall, 2), round(used, 2)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="One size instead of three.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    import transformers

    threads = torch.get_num_threads()
    print(
        json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "threads": threads}),
        flush=True,
    )
    sizes = [(options.width, options.layers)] if options.width else [(128, 2), (256, 4), (512, 6)]
    for width, layers in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            made = recipe(folder, width, layers, options.steps)
            bare, ours, between = (times[5:] for times in in_turn(made, folder))
        line: dict = {"width": width, "layers": layers, "steps": len(bare)}
        for which, clock in enumerate(("wall", "cpu")):
            a, b = (statistics.median(t[which] for t in times) for times in (bare, ours))
            line |= {f"bare_{clock}_ms": round(1e3 * a, 2), f"ours_{clock}_ms": round(1e3 * b, 2)}
            line[f"between_{clock}_ms"] = round(1e3 * statistics.median(t[which] for t in between), 2)
            line[f"overhead_{clock}"] = round(statistics.median(o[which] - x[which] for x, o in zip(bare, ours)) / a, 4)
        print(json.dumps(line), flush=True)
    if not torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as name:
            made = recipe(Path(name), 128, 2, 2)
            print(json.dumps({"start-up, [wall, CPU] seconds": start_up(Path(name), made)}), flush=True)


if __name__ == "__main__":
    main()
