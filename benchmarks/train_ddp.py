"""What would torch's DistributedDataParallel cost where engine `none` sums gradients itself (mllm/train/engine/reduce.py)?

A language model alone (random weights, bf16, compiled layers), forward and backward on every GPU with gradients summed, no update: without
any sum, by ours, by DistributedDataParallel as fast as it goes (static graph, buckets as gradients), and as it must be where parts go
without a gradient on some processes (find_unused_parameters). Milliseconds and peak memory of a pass.
``--cases``: which of a training's cases each way sums as one process does.

    python benchmarks/train_ddp.py                            # two GPUs, about 3 minutes
    python benchmarks/train_ddp.py --size tiny --device cpu   # checks the script
    python benchmarks/train_ddp.py --cases                    # two CPU processes, a minute
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
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


CASES = {
    "every part on every process": lambda rank, step: [["a", "b"]],
    "a part on one process only": lambda rank, step: [["a", "b"] if rank else ["a"]],
    "a part that some steps lack, now here, now there": lambda rank, step: [["a", "b"] if (rank + step) % 3 else ["a"]],
    "unlike numbers of passes": lambda rank, step: [["a", "b"]] * (1 + rank),
    "a loss of two passes through the model": lambda rank, step: [["a", "b"], ["a"]],
}
"""Case → heads that a process runs in each pass of a step. In the last case one backward pass follows both."""


def _gradients(way: str, case: str, rank: int, processes: int) -> Any:
    """Gradients of four steps end to end, as ``processes`` sum them."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from mllm.train.engine.reduce import OverlappedSum

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

        def forward(self, x: Any, heads: list[str]) -> Any:
            return sum(self.heads[name](self.trunk(x)).square().sum() for name in heads)

    torch.manual_seed(0)
    model: Any = Model()
    settings = {"find_unused_parameters": True} if "unused" in way else {"static_graph": True}
    runs = DistributedDataParallel(model, **settings) if way.startswith("ddp") else model
    ours = OverlappedSum(list(model.parameters())) if way == "ours" else None
    found = []
    for step in range(4):
        model.zero_grad()
        for own in range(2) if processes == 1 else [rank]:
            passes = CASES[case](own, step)
            torch.manual_seed(100 * step + own)
            inputs = [torch.randn(3, 8) for _ in passes]
            if case == "a loss of two passes through the model":
                if ours is not None:
                    ours.start()
                sum(runs(x, heads) for x, heads in zip(inputs, passes)).backward()
                continue
            for number, (x, heads) in enumerate(zip(inputs, passes)):
                last = number == len(passes) - 1
                if ours is not None and last:
                    ours.start()
                with nullcontext() if last or runs is model else runs.no_sync():
                    runs(x, heads).backward()
        if ours is not None:
            ours.finish()
        found += [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in model.parameters()]
    gradients = torch.cat(found)
    return gradients * processes if way.startswith("ddp") else gradients


def _case(rank: int, way: str, case: str, file: str, answers: Any) -> None:
    import torch.distributed as dist

    try:
        settings = {"init_method": f"file://{file}", "timeout": timedelta(seconds=20)}
        dist.init_process_group("gloo", rank=rank, world_size=2, **settings)
        wanted, found = _gradients("one", case, 0, 1), _gradients(way, case, rank, 2)
        off = float((wanted - found).abs().max() / wanted.abs().max())
        answers.put("equal" if off < 1e-6 else f"WRONG by {off:.2g} of the largest, without a word")
    except RuntimeError as error:
        answers.put(f"error: {str(error).strip().splitlines()[0][:110]}")


def cases() -> None:
    """Each case by each way, in two processes."""
    import torch

    context = torch.multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    print("case | " + " | ".join(WAYS[1:]))
    for case in CASES:
        said = []
        for way in WAYS[1:]:
            with tempfile.TemporaryDirectory() as folder:
                answers = context.Queue()
                started = [
                    context.Process(target=_case, args=(rank, way, case, f"{folder}/meet", answers), daemon=True)
                    for rank in range(2)
                ]
                for process in started:
                    process.start()
                found = [answers.get(timeout=90) for _ in started]
                for process in started:
                    process.join(5)
                    process.kill()
            said.append(min(found, key=lambda text: (text == "equal", text.startswith("error"))))
        print(f"{case} | " + " | ".join(said), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=tuple(LLAMAS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--cases", action="store_true")
    options = parser.parse_args()
    import torch.multiprocessing

    print(versions() | {"size": "cases" if options.cases else options.size})
    if options.cases:
        cases()
        return
    print("way | ms a pass | memory GB")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(2, options, f"{folder}/meet"), nprocs=2)


if __name__ == "__main__":
    main()
