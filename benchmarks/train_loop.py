"""What does the training loop cost beside a bare torch loop on the same model and batches, and how soon does it start?

Bare: forward, backward, clipping, AdamW on batches made beforehand. Ours: `mllm.train.trainer.optimizer_step` with counting, loss
reporting, NaN guard, logging and the data pipeline. Prints one JSON line; the goal is an overhead below 5 %.

    python benchmarks/train_loop.py                  # a small model on the CPU
    python benchmarks/train_loop.py --width 2048     # a larger one on a GPU
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


clock = time.perf_counter if torch.cuda.is_available() else time.process_time


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
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    stage = {"name": "sft", "steps": steps, "batch_size": 4, "precision": precision, "num_workers": 2, "log_every": 10}
    made = make_recipe(folder, stages=[stage], rows=64)
    made.model.language_model.config = text
    return made


def bare_loop(made, batches, steps: int) -> list[float]:
    from mllm.train.groups import apply_learning, set_modes
    from mllm.train.prepare import prepare_model
    from mllm.train.stages import start_model

    stage = made.stages[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = start_model(made, stage, None)
    apply_learning(model, stage)
    set_modes(model)
    prepare_model(model, stage, device=device, zero_stage=0)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    times = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        start = clock()
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        model(**inputs, use_cache=False, skip_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return times


def our_loop(made, folder: Path) -> tuple[list[float], list]:
    """Wall time of every step, from the end of one to the end of the next, and the batches."""
    from mllm.train import trainer

    times, kept, last = [], [], [clock()]
    step = trainer.optimizer_step

    def timed(engine, micro, *arguments, **options):
        kept.extend(micro)
        result = step(engine, micro, *arguments, **options)
        now = clock()
        times.append(now - last[0])
        last[0] = now
        return result

    trainer.optimizer_step = timed
    try:
        from mllm.train import run_recipe

        run_recipe(made, output=folder / "run")
    finally:
        trainer.optimizer_step = step
    return times, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = recipe(Path(folder), options.width, options.layers, options.steps)
        ours, batches = our_loop(made, Path(folder))
        started = sum(ours[:1])
        bare = bare_loop(made, batches, options.steps)
    skip = 5
    medians = [sorted(times[skip:])[len(times[skip:]) // 2] for times in (bare, ours)]
    print(
        json.dumps(
            {
                "width": options.width,
                "layers": options.layers,
                "bare_ms": round(1e3 * medians[0], 2),
                "ours_ms": round(1e3 * medians[1], 2),
                "overhead": round(medians[1] / medians[0] - 1, 4),
                "seconds_to_first_step": round(started, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
