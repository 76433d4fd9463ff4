"""How long does `mllm train` of a 7B take to say something, to have its model on the GPU, and to do its first step?

The real command, watched from outside: a 7B language model with CLIP-L and DINOv2-L, packed rows of 4096, compiled; from
scratch with a cold and a warm compile cache, and from published weights (13.5 GB of safetensors, in the page cache); on two
GPUs also (``--sections publish two shares``) how much host memory two processes take together, pages of mapped files counted once, and
whether ZeRO-3 starts the model where each GPU grants less than it takes.
Goals: first line within 3 s, model on the GPU within 10 s of its phase's begin, first step within 60 s cold and 20 s
warm. Each section is a process of its own; results also go to $OUT/train_start.txt.

    python benchmarks/train_start.py                            # one GPU, about 5 minutes
    python benchmarks/train_start.py --size tiny --device cpu   # checks the script
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import compiled_in, measure, text_config, watch, write_recipe

SECTIONS = {
    "check": 90.0,
    "publish": 120.0,
    "cold": 170.0,
    "warm": 100.0,
    "published": 120.0,
    "two": 150.0,
    "shares": 150.0,
}
ROOM = 9.0
"""GB that a process of section ``shares`` is granted of its GPU until the engine starts; weights alone are 13.5, and encoders 1.2."""


WITHIN = """
import mllm.train.stages.sft as sft

start = sft.start_model


def within(*given, **options):
    import torch

    torch.cuda.set_per_process_memory_fraction({room} * 1e9 / torch.cuda.mem_get_info()[1])
    found = start(*given, **options)
    print(f"started within {room} GB: {{torch.cuda.max_memory_allocated() / 1e9:.2f}} GB at most", flush=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


sft.start_model = within
"""


def check(options: argparse.Namespace, folder: Path) -> dict:
    """Small and exact: a model built on the device is the same for the same seed, published weights arrive unchanged."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mllm.models.build import build_model
    from tests.helpers import TINY_LLM, tiny_spec, tiny_tokenizer

    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    source = folder / "tiny-source"
    tiny_tokenizer().save_pretrained(str(source))
    config = {**TINY_LLM, "model_type": "llama"}

    wanted = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    wanted.save_pretrained(str(source))
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build_model(tiny_spec(str(source)), device=device)[0])
    pairs = list(zip(models[0].state_dict().items(), models[1].state_dict().values()))
    language = {"source": str(source), "tokenizer": str(source)}
    read, _ = build_model(tiny_spec(str(source), language_model=language), device=device)
    state = read.model.language_model.state_dict()
    ids = torch.randint(5, 200, (2, 9))
    with torch.no_grad():
        ours = read.eval()(input_ids=ids.to(device)).logits.cpu()
        theirs = wanted.eval()(input_ids=ids).logits
    return {
        "equal for one seed": all(torch.equal(value, other) for (_, value), other in pairs),
        "all on the device": all(t.device == device for t in [*read.parameters(), *read.buffers()]),
        "weights unchanged": all(torch.equal(state[n].cpu(), v) for n, v in wanted.base_model.state_dict().items()),
        "logits differ by": float((ours - theirs).abs().max()),
    }


def publish(options: argparse.Namespace, folder: Path) -> dict:
    """Random weights in a published model's files; not timed for its own sake."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.helpers import tiny_tokenizer

    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config(options.size)))
    made = time.perf_counter() - began
    model.save_pretrained(str(folder / "published"), max_shard_size="5GB")
    tiny_tokenizer().save_pretrained(str(folder / "published"))
    size = sum(f.stat().st_size for f in (folder / "published").glob("*.safetensors"))
    return {"made on the device in s": round(made, 1), "GB": round(size / 1e9, 2)}


def start(options: argparse.Namespace, folder: Path, name: str) -> dict:
    source = folder / "published" if name in ("published", "two", "shares") else None
    compiled = options.device == "cuda" and name != "shares"
    engine = {"engine": "zero3"} if name == "shares" else {}
    recipe = write_recipe(
        folder, options.size, name=name, source=source, steps=50, compile=compiled, num_workers=4, **engine
    )
    if name == "cold":
        shutil.rmtree(folder / "compiled", ignore_errors=True)
    arguments = ("--processes", "2") if name in ("two", "shares") else ()
    if name == "shares" and options.device == "cuda":
        plugin = folder / "within.py"
        plugin.write_text(WITHIN.format(room=ROOM), encoding="utf-8")
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "plugins": [str(plugin)]}), encoding="utf-8")
    limit = SECTIONS[name] * options.patience - 5
    seen = watch(recipe, steps=4, limit=limit, arguments=arguments, **compiled_in(folder))
    shutil.rmtree(folder / name, ignore_errors=True)
    reading = seen.line_of(r"reading weights of .*GB/s")
    building, ready = seen.second_of("building the model on"), seen.second_of(r"what learns|planning batches")
    return {
        "first line s": seen.lines[0][0] if seen.lines else None,
        "longest silence s": max((round(b - a, 1) for (a, _), (b, _) in zip(seen.lines, seen.lines[1:])), default=None),
        "model begun at s": building,
        "model ready at s": ready,
        "read": reading.rpartition(": ")[2] if reading else None,
        "first step s": seen.first_step,
        "own memory GB": seen.peak_own_gb,
        "memory with mapped files GB": seen.peak_gb,
        "granted": seen.line_of("started within"),
        "steps seen": len(seen.steps),
        "exit code": seen.code,
    }


def work(options: argparse.Namespace, folder: Path, name: str) -> dict:
    small = {"check": check, "publish": publish}.get(name)
    return small(options, folder) if small else start(options, folder, name)


def main() -> None:
    rows = measure(__file__, __doc__, SECTIONS, work, limit=470.0, left_out=lambda name: name in ("two", "shares"))
    if not rows:
        return
    keys = ("first line s", "model begun at s", "model ready at s", "read", "first step s", "own memory GB")
    print("section | " + " | ".join(keys))
    for row in rows:
        if "first line s" in row or "error" in row:
            print(f"{row['section']} | " + " | ".join(str(row.get(key, "")) for key in keys), row.get("error", ""))


if __name__ == "__main__":
    main()
