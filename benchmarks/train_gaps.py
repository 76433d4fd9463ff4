"""Where does a 7B's step lose time on one GPU, and what would another attention kernel give back?

attention: torch's variable-length kernel against FlashAttention 4 (where flash-attn-4 is installed) and cuDNN's on the step's own packed
rows. gaps: two profiled steps, kernels by kind, and where no kernel runs. plain: `mllm train` as in train_real.py; adopted: the same with
``attention: auto``, which runs an installed kernel that is right. Adopted by us: what gains 3 % of a step.

    python benchmarks/train_gaps.py                            # one GPU, about 5 minutes; also $OUT/train_gaps.txt
    python benchmarks/train_gaps.py --sections attention plain adopted   # what an attention kernel gives, 3 minutes
    python benchmarks/train_gaps.py --size tiny --device cpu --patience 6   # checks the script
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import compiled_in, measure, watch, write_recipe
from mllm.train.observe.trace import of_kernels

SECTIONS = {"attention": 90.0, "gaps": 110.0, "plain": 80.0, "adopted": 110.0}
SKIP, STEPS = 4, 24


def attention(options: argparse.Namespace, folder: Path) -> dict:
    """Forward and backward over rows as the training packs them: 8 samples of about 1,050 tokens, 32 heads of 128."""
    import torch
    import torch.nn.attention.varlen as varlen

    from mllm.train import flash
    from mllm.varlen import segment_attention

    if options.device != "cuda":
        return {}
    ends = [0, 1010, 2090, 3050, 4096, 5200, 6150, 7300, 8192]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
    filled = torch.cat([bounds, bounds[-1:].expand(8)])  # as the collator fills up the number of samples
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(8192, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def once(edges=bounds):
        for tensor in inputs:
            tensor.grad = None
        output = segment_attention(q, k, v, edges, 2048, causal=True)
        output.backward(up)
        return [output, *(tensor.grad for tensor in inputs)]

    def timed(edges=bounds) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(5):
            once(edges)
        start.record()
        for _ in range(20):
            once(edges)
        end.record()
        torch.cuda.synchronize()
        return round(start.elapsed_time(end) / 20, 3)

    def compared() -> list[float]:
        pairs = zip(reference, (t.detach().float() for t in once()), strict=True)
        return [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]

    reference = [t.detach().float() for t in once()]
    flops = 14 * 32 * 128 * sum((b - a) ** 2 for a, b in pairwise(ends)) / 2
    found: dict = {"torch ms": timed()}
    found["torch TFLOP/s"] = round(flops / found["torch ms"] / 1e9, 1)
    began = time.perf_counter()
    problem = flash.tried(
        "FA4", [flash.Heads(128, 32, 32, packed=True), flash.Heads(64, 4, 4, packed=False)], bounds.device
    )
    found["FA4 is left out, because"], found["FA4 tried in s"] = problem, round(time.perf_counter() - began, 1)
    if problem is None:
        found["FA4: largest difference of output and three gradients"] = compared()
        found["FA4 ms"], found["FA4 ms, 8 empty"] = timed(), timed(filled)
        found["FA4 TFLOP/s"] = round(flops / found["FA4 ms"] / 1e9, 1)
        flash.release()
        found["torch ms again"] = timed()
    print(json.dumps(found), flush=True)  # what follows may end the process
    varlen._should_use_cudnn = lambda index: True  # the choice is torch's own and off there
    # Another number of samples would be another cuDNN plan, so that rows would be filled up with empty ones; are these right, too?
    for name, edges in {"cuDNN": bounds, "cuDNN, 8 empty": filled}.items():
        try:
            pairs = zip(reference, (t.detach().float() for t in once(edges)), strict=True)
            found[f"{name}: largest difference"] = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
            found[f"{name} ms"] = timed(edges)
        except Exception as error:  # a kernel that refuses is the answer
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def gaps(options: argparse.Namespace, folder: Path) -> dict:
    """Two steps' kernels by kind, and the time between the first and the last in which none ran."""
    steps = 2
    seen = _watch(options, folder, "gaps", steps=6, limit=SECTIONS["gaps"], arguments=("--profile", str(steps)))
    trace = folder / "gaps" / "profile" / "sft-0.json"
    if not trace.is_file():
        return {"error": "no trace", "steps seen": len(seen.steps)}
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    division = of_kernels(events, steps)
    if division is None:
        return {"kernels": 0}
    longest = [(round(gap, 3), before[:50], after[:50]) for gap, before, after in division.gaps]
    return {
        "ms a step": {kind: round(value, 2) for kind, value in division.kinds.items()},
        "between first and last": round(division.whole, 2),
        "no kernel runs": round(division.idle, 2),
        "longest gaps (ms, before, after)": longest,
    }


def training(options: argparse.Namespace, folder: Path, name: str) -> dict:
    short = "".join(c if c.isalnum() else "-" for c in name)
    settings = {"attention": "auto"} if name == "adopted" else {}
    seen = _watch(options, folder, short, steps=SKIP + STEPS, limit=SECTIONS[name], **settings)
    shutil.rmtree(folder / short, ignore_errors=True)
    found = {key: seen.middle(key, SKIP) for key in ("seconds", "tokens_per_second", "memory_gb")}
    rates = sorted(step["tflops"]["language_model"] for step in seen.steps[SKIP:] if "tflops" in step)
    return {
        **{key: None if value is None else round(value, 4) for key, value in found.items()},
        "tflops": round(rates[len(rates) // 2], 1) if rates else None,
        "losses": [round(step["loss"], 4) for step in seen.steps[:3]],
        "steps seen": len(seen.steps),
        "said of attention": seen.line_of("attention runs"),
        "first step s": seen.first_step,
    }


def _watch(options, folder: Path, name: str, *, steps: int, limit: float, arguments: tuple[str, ...] = (), **settings):
    settings |= {"num_workers": options.workers, "compile": options.device == "cuda"}
    recipe = write_recipe(folder, options.size, name=name, steps=200, **settings)
    limit = limit * options.patience - 5
    return watch(recipe, steps=steps, limit=limit, arguments=arguments, **compiled_in(folder))


def work(options: argparse.Namespace, folder: Path, name: str) -> dict:
    small = {"attention": attention, "gaps": gaps}.get(name)
    return small(options, folder) if small else training(options, folder, name)


def main() -> None:
    workers = {"type": int, "default": 6, "help": "Processes that decode pictures."}
    rows = measure(__file__, __doc__, SECTIONS, work, limit=270.0, own={"workers": workers})
    for row in rows:
        if row.get("seconds"):
            print(
                f"{row['section']} | {1e3 * row['seconds']:.1f} ms | {row['tokens_per_second']:.0f} tok/s | {row['tflops']}"
            )


if __name__ == "__main__":
    main()
