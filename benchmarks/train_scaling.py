"""How well do the engines scale from one GPU to several?

A language model of a stated size, random weights, bf16 with fp32 copies, rows of a stated length; the optimizer step is
`mllm.train.trainer`'s, the engines are `mllm.train.engine.base`'s. First, in fp32 and tiny: does every engine give one
process's weights? Then one JSON line for each engine and number of processes, each in processes of its own, and a table;
also in $OUT/train_scaling.txt. Goal: at least 0.97 of perfect scaling on two GPUs, 0.95 on four. Each line has the last step's loss and
whether all processes hold the same weights to the bit; update ms: a GPU's time from the end of the backward pass to that of the step.

    python benchmarks/train_scaling.py --size 1b --processes 1 2
    python benchmarks/train_scaling.py --size 7b --processes 1 2 4 --rows 2 --length 4096 --compile
    python benchmarks/train_scaling.py --size 7b --rows 2 --length 4096 --compile --accumulation 1 \
        --sections "none x 1" "none x 2" "zero1 x 2" "sharded x 2"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import run_sections, versions


def worker(engine_name: str, options: dict, path: str) -> None:
    from transformers import LlamaConfig

    from benchmarks.train_packing import SIZES
    from mllm import distributed
    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.recipe import StageSpec
    from mllm.train.engine.base import choose_engine
    from mllm.train.engine.build import build_engine
    from mllm.train.engine.groups import apply_learning, set_modes
    from mllm.train.prepare import prepare_model

    device = distributed.local_device()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    stage = StageSpec(
        name="bench",
        learn={"language_model": 1e-5},
        data="none",
        steps=1,
        batch_size=options["rows"],
        gradient_accumulation=options["accumulation"],
        max_length=options["length"],
        engine=engine_name,
        dtype=dtype,
        compile=options["compile"] and engine_name != "zero3",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    with torch.device(device):
        text = LlamaConfig(vocab_size=32064, max_position_embeddings=8192, **SIZES[options["size"]])
        model = MllmForConditionalGeneration(MllmConfig(text_config=text.to_dict()))
    torch.set_default_dtype(torch.float32)
    groups = apply_learning(model, stage)
    set_modes(model)
    prepare_model(model, stage, device=device, zero_stage=choose_engine(stage).zero_stage)
    engine = build_engine(model, groups, stage, device)
    ids = torch.randint(5, 32000, (options["rows"], options["length"]), device=device)
    count = options["rows"] * options["length"] * options["accumulation"] * distributed.world_size()
    times, updates, loss = [], [], 0.0
    for _ in range(options["steps"] + options["warmup"]):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for micro in range(options["accumulation"]):
            output = engine(
                input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=count, skip_logits=engine.zero_stage != 3
            )
            engine.backward(output.loss, last=micro == options["accumulation"] - 1)
        update = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        for event in update[:1]:
            event.record()
        engine.step()
        for event in update[1:]:
            event.record()
        if device.type == "cuda":
            torch.cuda.synchronize()
            updates.append(update[0].elapsed_time(update[1]))
        loss = float(output.loss.detach())
        times.append(time.perf_counter() - start)
    held = [] if engine.shares_weights else [_sum_of_bits(p) for p in model.parameters()]
    same = all(other == held for other in distributed.gather_objects(held))
    loss = distributed.sum_numbers([loss])[0]
    if distributed.is_main():
        median = sorted(times[options["warmup"] :])[options["steps"] // 2]
        weights = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
        memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None
        result = {
            "engine": engine_name,
            "processes": distributed.world_size(),
            "size": options["size"],
            "ms": round(1e3 * median, 1),
            "tokens_per_second": round(count / median),
            "tflops_per_gpu": round(6 * weights * count / median / distributed.world_size() / 1e12, 1),
            "memory_gb": None if memory is None else round(memory, 1),
            "update_ms": round(sorted(updates[options["warmup"] :])[options["steps"] // 2], 1) if updates else None,
            "loss_of_last_micro_step": loss,
            "weights equal everywhere": same if held else None,
        }
        Path(path).write_text(json.dumps(result), encoding="utf-8")
    engine.close()


def _sum_of_bits(parameter: torch.Tensor) -> int:
    bits = parameter.detach().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
    return int(bits.sum(dtype=torch.int64))


def check(folder: Path, engines: list[str], processes: list[int]) -> dict:
    """Losses and final weights of a tiny fp32 recipe with and without pictures, by engine and processes: how far from one
    process's?"""
    from safetensors.torch import load_file

    from mllm.train import run_recipe
    from mllm.train.engine.base import SHIPPED
    from tests.integration.train_helpers import make_recipe, small_is_large

    # The weights of this recipe are all small: let the sharded engine take most as large ones.
    plugin = small_is_large(folder)
    assert set(engines) <= set(SHIPPED), engines

    def weights(engine: str, count: int) -> dict:
        most = max(processes)
        calm = {"eps": 1e-5}  # Adam turns rounding noise in near-zero gradients into whole steps otherwise
        stage = {"name": "sft", "steps": 3, "batch_size": most // count, "engine": engine, "optimizer": calm}
        recipe = make_recipe(folder, stages=[stage])
        recipe.model.language_model.config["attention_dropout"] = 0.0
        recipe.plugins = [plugin]
        return load_file(run_recipe(recipe, output=folder / f"{engine}-{count}", processes=count) / "model.safetensors")

    wanted, found = weights("none", 1), {}
    for engine in engines:
        for count in processes:
            if (engine, count) != ("none", 1):
                got = weights(engine, count)
                found[f"{engine} x {count}"] = max((wanted[n] - got[n]).abs().max().item() for n in wanted)
    return {"weights differ from one process's by": found}


def main() -> None:
    from mllm.train.launch import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--engines", nargs="+", default=["none", "sharded", "zero1", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sections", nargs="+", help='In place of engines and processes: "none x 1" "sharded x 2" …')
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048 if torch.cuda.is_available() else 64)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--limit", type=float, default=470.0, help="Seconds for all sections together.")
    parser.add_argument("--seconds", type=float, default=80.0, help="Seconds for one engine on some processes.")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["sections"]:
        named = [section.partition(" x ") for section in options["sections"]]
        options["engines"] = list(dict.fromkeys(engine for engine, _, _ in named))
        options["processes"] = sorted({int(count) for _, _, count in named})
    section = options["section"]
    if section == "check":
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(check(Path(name), options["engines"], options["processes"])), flush=True)
        return
    if section:
        engine, _, count = section.partition(" x ")
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "result.json"
            launch(worker, int(count), engine, options, str(path), needs_group=engine.startswith("zero"))
            print(path.read_text(encoding="utf-8"), flush=True)
        return
    each = options["sections"] or [
        f"{engine} x {count}" for count in options["processes"] for engine in options["engines"]
    ]
    sections = {"check": 3 * options["seconds"], **dict.fromkeys(each, options["seconds"])}
    passed = []
    for key in ("size", "engines", "processes", "rows", "length", "accumulation", "steps", "warmup"):
        value = options[key]
        passed += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    passed += ["--compile"] if options["compile"] else []
    results = Path(os.environ.get("OUT", tempfile.mkdtemp())) / "train_scaling.txt"
    rows = run_sections(__file__, sections, passed, limit=options["limit"], results=results)
    single = next((r["tokens_per_second"] for r in rows if r.get("engine") == "none" and r["processes"] == 1), None)
    for row in rows:
        if single and "tokens_per_second" in row:
            row["of one GPU per GPU"] = round(row["tokens_per_second"] / single / row["processes"], 3)
    rows.insert(0, versions())
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("engine x processes | ms | tokens/s | TFLOP/s a GPU | of `none` on one GPU, per GPU | memory GB | update ms")
    keys = ("ms", "tokens_per_second", "tflops_per_gpu", "of one GPU per GPU", "memory_gb", "update_ms")
    for row in rows[1:]:
        shown = [row.get(k, "") for k in keys]
        print(" | ".join(map(str, [row["section"], *shown])), row.get("error", ""))


if __name__ == "__main__":
    main()
