"""What would torch's DistributedDataParallel cost where engine `none` sums gradients itself (mllm/train/engine/reduce.py)?

A language model alone (random weights, bf16, compiled layers), forward and backward on every GPU with gradients summed, no update: without
any sum, by ours, by DistributedDataParallel as fast as it goes (static graph, buckets as gradients), and as it must be where parts go
without a gradient on some processes (find_unused_parameters). Milliseconds and peak memory of a pass.

    python benchmarks/train_ddp.py                            # two GPUs, about 3 minutes
    python benchmarks/train_ddp.py --size tiny --device cpu   # checks the script
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import LLAMAS, text_config, versions

WAYS = ("no sum", "ours", "ddp, static graph", "ddp, unused parameters")


def work(rank: int, processes: int, options: argparse.Namespace, file: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoConfig, AutoModelForCausalLM

    from mllm.train.engine.reduce import OverlappedSum

    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    rows, length = (2, 4096) if options.size == "7b" else (4, 2048) if cuda else (1, 32)
    config = AutoConfig.for_model(**text_config(options.size), use_cache=False)
    for way in WAYS:
        torch.manual_seed(0)
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if cuda:
            for layer in model.model.layers:
                layer.compile()
        runs, ours = model, None
        if way.startswith("ddp"):
            unused = "unused" in way
            settings = {"find_unused_parameters": True} if unused else {"static_graph": True}
            runs = DistributedDataParallel(
                model,
                device_ids=[rank] if cuda else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
                **settings,
            )
        elif way == "ours":
            ours = OverlappedSum(list(model.parameters()))
        torch.manual_seed(rank + 1)
        ids = torch.randint(0, config.vocab_size, (rows, length), device=device)
        times = []
        for number in range(options.passes + 4):
            if number == 4 and cuda:
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            began = time.perf_counter()
            loss = runs(input_ids=ids, labels=ids).loss
            if ours is not None:
                ours.start()
            loss.backward()
            if ours is not None:
                ours.finish()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            for parameter in model.parameters():
                parameter.grad = None
        if rank == 0:
            peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
            print(f"{way} | {1000 * median(times[4:]):.1f} | {peak:.1f}", flush=True)
        if ours is not None:
            ours.close()
        del runs, model, ours, loss
        if cuda:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=tuple(LLAMAS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--passes", type=int, default=12)
    options = parser.parse_args()
    import torch.multiprocessing

    print(versions() | {"size": options.size})
    print("way | ms a pass | memory GB")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(2, options, f"{folder}/meet"), nprocs=2)


if __name__ == "__main__":
    main()
