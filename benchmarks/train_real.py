"""How fast does the real trainer train a 7B with two live encoders on one GPU, and what does the update cost?

`mllm train` itself, watched from outside: Llama-7B, CLIP-L/336 and DINOv2-L/336 live and frozen, JPEGs decoded, rows of
4096 packed, each layer compiled, bf16 with fp32 copies. Accumulation 1 and 4, the update in one kernel and as separate
operations. Before that: is the kernel right (fp32, 1e-6 over 100 steps), what does it cost a parameter, and what does
matmul alone sustain. TFLOP/s count the language model only (useful tokens, exact causal attention) over whole steps.
Goals: 0.90 of the sustained matmul rate (0.92 with accumulation 4), update of a 7B within 55 ms.

    python benchmarks/train_real.py                            # one GPU, about 7 minutes; also $OUT/train_real.txt
    python benchmarks/train_real.py --size tiny --device cpu --patience 6   # checks the script
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import compiled_in, measure, watch, write_recipe

SECTIONS = {
    "kernel": 90.0,
    "update": 60.0,
    "matmul": 40.0,
    "fused, accumulation 1": 110.0,
    "plain, accumulation 1": 90.0,
    "fused, accumulation 4": 130.0,
    "fused, 3 rows, accumulation 1": 90.0,
    "profile": 100.0,
}
SKIP = 4
"""Steps not counted: compilation, first allocation."""
PARAMETERS_7B = 6_738_939_904


def kernel(options: argparse.Namespace, folder: Path) -> dict:
    """A hundred clipped steps by the kernel, by its reference and by `torch.optim.AdamW`, on sizes that fill its blocks and
    sizes that do not."""
    import torch
    from torch import nn

    from mllm.train.engine.fused_adamw import fused_update, reference_update

    cuda = options.device == "cuda"
    update = fused_update if cuda else reference_update  # on a CPU only the script is checked
    device, found = torch.device(options.device), {}
    for shape in [(65536,), (70001,), (4096, 1031), (1 << 22,)] if cuda else [(70, 31)]:
        torch.manual_seed(0)
        parameter = torch.randn(shape, device=device).bfloat16()
        copies = [parameter.float() for _ in range(2)]
        weights = [parameter.clone() for _ in range(2)]
        states = [(torch.zeros_like(copies[0]), torch.zeros_like(copies[0])) for _ in range(2)]
        torchs = nn.Parameter(parameter.float())
        optimizer = torch.optim.AdamW([torchs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
        for step in range(1, 101):
            gradient = (torch.randn(shape, device=device) * 10.0 ** (step % 5 - 3)).bfloat16()
            scale, rate = torch.full((), 1.0 / (1 + step % 3), device=device), 1e-3 * (1 + step % 7)
            numbers = {"rate": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": step}
            for which, one in enumerate((update, reference_update)):
                one(weights[which], gradient, copies[which], *states[which], scale=scale, **numbers)
            torchs.grad, optimizer.param_groups[0]["lr"] = gradient.float() * scale, rate
            optimizer.step()
        largest = torchs.detach().abs().max()
        found[str(shape)] = {
            "kernel - reference": float((copies[0] - copies[1]).abs().max() / largest),
            "kernel - torch": float((copies[0] - torchs).abs().max() / largest),
            "mean": float((states[0][0] - states[1][0]).abs().max() / states[1][0].abs().max()),
            "square": float((states[0][1] - states[1][1]).abs().max() / states[1][1].abs().max()),
            "weights are rounded copies": bool(torch.equal(weights[0], copies[0].bfloat16())),
        }
    return {"differences over 100 steps": found}


def update(options: argparse.Namespace, folder: Path) -> dict:
    """Time of clip and update, by `MasterWeights`, over tensors of a 7B's shapes."""
    import torch
    from torch import nn

    from mllm.recipe import OptimizerSpec
    from mllm.train.engine.groups import Group
    from mllm.train.engine.optim import build_optimizer

    cuda = options.device == "cuda"
    result: dict = {}
    for fused in (True, False) if cuda else (None,):
        width, wide, layers = (4096, 11008, 12) if cuda else (32, 64, 2)
        shapes = [*[(width, width)] * 4, *[(wide, width)] * 2, (width, wide), (width,), (width,)] * layers
        with torch.device(options.device):
            model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes])
        names = tuple(name for name, _ in model.named_parameters())
        count = sum(p.numel() for p in model)
        spec = OptimizerSpec(fused=fused)
        optimizer = build_optimizer(model, [Group("language_model", 1e-5, 0.0, names, count)], spec, master=True)
        times = []
        for _ in range(8):
            for parameter in model:
                parameter.grad = torch.full_like(parameter, 1e-3)
            scale = torch.full((), 0.5, device=options.device)
            times.append(_timed(optimizer.step, scale, options.device))
        seconds = sorted(times[2:])[3]
        label = {True: "fused", False: "plain", None: "plain"}[fused]
        result[label] = {
            "ms": round(1e3 * seconds, 2),
            "ms for 7B": round(1e3 * seconds * PARAMETERS_7B / count, 1),
            "TB/s at 28 bytes": round(28 * count / seconds / 1e12, 2),
        }
        del model, optimizer
        if cuda:
            torch.cuda.empty_cache()
    return result


def _timed(work, argument, device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work(argument)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul(options: argparse.Namespace, folder: Path) -> dict:
    from benchmarks.train_step import matmul_rate

    return {"sustained TFLOP/s over 8 s": round(matmul_rate(8.0), 1)} if options.device == "cuda" else {}


def training(options: argparse.Namespace, folder: Path, name: str) -> dict:
    accumulation = 4 if "accumulation 4" in name else 1
    short = "".join(c if c.isalnum() else "-" for c in name)
    compiled = options.device == "cuda"
    stage: dict = {"gradient_accumulation": accumulation, "num_workers": options.workers, "compile": compiled}
    stage["optimizer"] = {"betas": [0.9, 0.95], **({"fused": False} if "plain" in name else {})}
    if "3 rows" in name:
        stage["batch_size"] = 3
    recipe = write_recipe(folder, options.size, name=short, steps=200, **stage)
    steps = SKIP + (8 if accumulation > 1 else 16)
    arguments = ("--profile", "2") if name == "profile" else ()
    steps = 6 if name == "profile" else steps
    limit = SECTIONS[name] * options.patience - 5
    seen = watch(recipe, steps=steps, limit=limit, arguments=arguments, **compiled_in(folder))
    if name == "profile":
        table = folder / short / "profile" / "sft-0.txt"
        if table.is_file() and "OUT" in os.environ:
            shutil.copy(table, Path(os.environ["OUT"]) / "train_real_profile.txt")
    shutil.rmtree(folder / short, ignore_errors=True)
    found = {key: seen.middle(key, SKIP) for key in ("seconds", "tokens_per_second", "images_per_second", "fill")}
    for key in ("data_wait", "memory_gb"):
        found[key] = seen.middle(key, SKIP)
    rates = [step["tflops"]["language_model"] for step in seen.steps[SKIP:] if "tflops" in step]
    found["tflops"] = sorted(rates)[len(rates) // 2] if rates else None
    return {
        **{key: None if value is None else round(value, 4) for key, value in found.items()},
        "losses": [round(step["loss"], 4) for step in seen.steps[:3]],
        "first step s": seen.first_step,
        "steps seen": len(seen.steps),
        "exit code": seen.code,
    }


def work(options: argparse.Namespace, folder: Path, name: str) -> dict:
    small = {"kernel": kernel, "update": update, "matmul": matmul}.get(name)
    return small(options, folder) if small else training(options, folder, name)


def main() -> None:
    workers = {"type": int, "default": 6, "help": "Processes that decode pictures."}
    rows = measure(
        __file__, __doc__, SECTIONS, work, limit=470.0, own={"workers": workers}, left_out=lambda name: "3 rows" in name
    )
    if not rows:
        return
    sustained = next((v for row in rows for k, v in row.items() if k.startswith("sustained")), None)
    print("section | ms a step | tok/s | TFLOP/s | of sustained matmul | data wait | memory GB | first step s")
    for row in rows:
        if row.get("tflops"):
            share = round(row["tflops"] / sustained, 3) if sustained else "?"
            print(
                f"{row['section']} | {1e3 * row['seconds']:.0f} | {row['tokens_per_second']:.0f} | {row['tflops']:.0f} | "
                f"{share} | {row['data_wait']:.3f} | {row['memory_gb']} | {row['first step s']}"
            )
        elif "error" in row:
            print(f"{row['section']} | {row['error']}")


if __name__ == "__main__":
    main()
