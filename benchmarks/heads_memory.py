"""Does `mllm plan` say how much memory a stage with a segmentation head takes on a GPU?

Trains some steps of ``recipes/segmentation_demo.yaml`` at a size that fills a part of a GPU (a language model of 0.6 billion parameters, a
ViT-L/14 at 336 pixels whose features the head reads, bf16, 16 rows), with the head and without, and prints the plan's peak beside what
torch allocated.

    python benchmarks/heads_memory.py --output benchmarks/results/heads_memory_h200.txt     # half a minute on an H200
    python benchmarks/heads_memory.py --small                                               # tiny sizes on a CPU: the plan alone
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.scenes import prepare_scenes, train_text_tokenizer
from mllm.recipe import Recipe, load_recipe
from mllm.train.preflight.plan import plan_recipe
from mllm.train.run import run_recipe

LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16,
         "num_key_value_heads": 16, "initializer_range": 0.02}  # fmt: skip
VIT = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
       "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip


def recipe_of(root: Path, options: argparse.Namespace, *, head: bool, freeze: bool) -> Recipe:
    """The demo at this size, with its head or without. freeze: the encoder learns nothing, as in most published stages."""
    file = "train" if head else "words"
    path = str(root / f"data/{file}.jsonl")
    dataset = {"name": f"scenes_{file}", "format": "messages", "path": path, "licence": "Apache-2.0"}
    learn = {"connector": 1e-4, "language_model": 1e-5}
    learn |= ({"heads": 1e-4} if head else {}) | ({} if freeze else {"encoders": 1e-5})
    changes = {
        "model.language_model.tokenizer": str(root / "text"),
        "stages.sft.data": json.dumps({"datasets": [{"dataset": dataset}]}),
        "stages.sft.learn": json.dumps(learn),
        "stages.sft.steps": options.steps,
        "stages.sft.log_every": 1,
    }
    if not head:
        changes["model.heads"] = "{}"
    if not options.small:
        changes |= {f"model.language_model.config.{key}": value for key, value in LARGE.items()}
        eye = {"type": "hf", "image_size": 336, "layers": [-2], "architecture": VIT}
        changes |= {"model.encoders": json.dumps({"eye": eye}), "stages.sft.dtype": "bfloat16"}
        changes |= {"stages.sft.batch_size": options.rows}
        if head:
            changes["model.heads.marks.decoder"] = json.dumps({"type": "query", "width": 256, "depth": 2, "heads": 8})
    whole = load_recipe("segmentation_demo", [f"{key}={value}" for key, value in changes.items()])
    whole.stages = whole.stages[:1]
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"python benchmarks/heads_memory.py; {date.today()}, one {where}, torch {torch.__version__}, {options.rows} rows"
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_scenes(root / "data", train=(options.steps + 1) * options.rows, test=2)
        train_text_tokenizer(root / "text")
        for head, freeze in ((True, True), (False, True), (True, False)):
            began = time.perf_counter()
            recipe = recipe_of(root, options, head=head, freeze=freeze)
            (stage,) = plan_recipe(recipe, gpu_memory=140e9).stages
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            run_recipe(recipe, output=root / f"{head}{freeze}")
            line = f"{'with' if head else 'without'} head, encoder {'frozen' if freeze else 'learned'}: plan {stage.peak / 1e9:.2f} GB"
            if torch.cuda.is_available():
                peak, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
                share = 1e-9 * stage.peak / peak - 1
                line += f", allocated at most {peak:.2f} GB (plan {share:+.1%}), reserved {reserved:.2f} GB"
            lines.append(line)
            print(f"{line}  [{time.perf_counter() - began:.0f} s]", flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
