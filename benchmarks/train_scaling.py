"""How well do the engines scale from one GPU to several?

A language model of a stated size, random weights, bf16 with fp32 copies, rows of a stated length; the optimizer step is
`mllm.train.trainer`'s, the engines are `mllm.train.engine.base`'s. Prints one JSON line for each engine and number of processes. Goal: at
least 0.93 of perfect scaling on two GPUs.

    python benchmarks/train_scaling.py --size 1b --engines none zero1 zero2 zero3 --processes 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def worker(engine_name: str, options: dict, path: str) -> None:
    from transformers import LlamaConfig

    from benchmarks.train_packing import SIZES
    from mllm import distributed
    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.recipe import StageSpec
    from mllm.train.engine.base import build_engine
    from mllm.train.engine.groups import apply_learning, set_modes
    from mllm.train.prepare import prepare_model

    device = distributed.local_device()
    precision = "bf16" if device.type == "cuda" else "fp32"
    stage = StageSpec(
        name="bench",
        learn={"language_model": 1e-5},
        data="none",
        steps=1,
        batch_size=options["rows"],
        gradient_accumulation=options["accumulation"],
        max_length=options["length"],
        engine=engine_name,
        precision=precision,
        compile=options["compile"] and engine_name != "zero3",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.device(device):
        text = LlamaConfig(vocab_size=32064, max_position_embeddings=8192, **SIZES[options["size"]])
        model = MllmForConditionalGeneration(MllmConfig(text_config=text.to_dict()))
    torch.set_default_dtype(torch.float32)
    groups = apply_learning(model, stage)
    set_modes(model)
    prepare_model(model, stage, device=device, zero_stage=0 if engine_name == "none" else int(engine_name[-1]))
    engine = build_engine(model, groups, stage, device)
    ids = torch.randint(5, 32000, (options["rows"], options["length"]), device=device)
    count = options["rows"] * options["length"] * options["accumulation"] * distributed.world_size()
    times = []
    for _ in range(options["steps"] + options["warmup"]):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for micro in range(options["accumulation"]):
            output = engine(
                input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=count, skip_logits=engine.zero_stage != 3
            )
            engine.backward(output.loss, last=micro == options["accumulation"] - 1)
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
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
        }
        Path(path).write_text(json.dumps(result), encoding="utf-8")
    engine.close()


def main() -> None:
    from mllm.train.launch import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--engines", nargs="+", default=["none", "zero1", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048 if torch.cuda.is_available() else 64)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    options = vars(parser.parse_args())
    path = Path(tempfile.mkdtemp()) / "result.json"
    for engine in options["engines"]:
        single = None
        for processes in options["processes"]:
            launch(worker, processes, engine, options, str(path), needs_group=engine != "none")
            result = json.loads(path.read_text(encoding="utf-8"))
            single = single or result["tokens_per_second"]
            result["scaling"] = round(result["tokens_per_second"] / single / processes * options["processes"][0], 3)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
