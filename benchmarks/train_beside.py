"""Where does a 7B's step lose time on one GPU, and what do encoders beside the update and cuDNN's attention give back?

exact: CLIP-L and DINOv2-L on a stream of their own while real updates run on the main one: equal to the bit, batch after batch?
attention: torch's variable-length kernel against cuDNN's on the step's own packed rows. gaps: two profiled steps, kernels by kind, and
where no kernel runs. plain, beside: `mllm train` as in train_real.py without and with ``encoders_beside_update``, twice in turn.
Adopted: what gains 3 % of a step.

    python benchmarks/train_beside.py                            # one GPU, about 7 minutes; also $OUT/train_beside.txt
    python benchmarks/train_beside.py --size tiny --device cpu --patience 6   # checks the script
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import CLIP_L, DINO_L, compiled_in, measure, watch, write_recipe

SECTIONS = {"exact": 60.0, "attention": 60.0, "gaps": 110.0, "plain": 80.0, "beside": 80.0, "plain again": 70.0}
SKIP, STEPS = 4, 24
KINDS = {
    "attention": ("flash", "fmha", "attn", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "update": ("update_kernel",),
    "compiled elementwise": ("triton_",),
    "copies": ("memcpy", "memset", "copy"),
}


def exact(options: argparse.Namespace, folder: Path) -> dict:
    """Features on a stream of their own, beside updates, against the same encoders' alone."""
    import torch
    from torch import nn

    from mllm.data.collate import Batch
    from mllm.models.pipeline import EncoderBank
    from mllm.recipe import StageSpec
    from mllm.train.encoder_stream import EncoderStream
    from mllm.train.engine.fused_adamw import fused_update, reference_update
    from tests.helpers import TINY_CLIP, TINY_TIMM

    cuda, device = options.device == "cuda", torch.device(options.device)
    torch.manual_seed(0)
    clip = {"type": "hf", "architecture": CLIP_L, "layers": [-2], "final_norm": False}
    encoders = {"semantic": clip, "spatial": {"type": "hf", "architecture": DINO_L, "image_size": 336}}
    bank = EncoderBank(encoders if cuda else {"semantic": TINY_CLIP, "spatial": TINY_TIMM})
    bank = bank.to(device, torch.bfloat16 if cuda else torch.float32).requires_grad_(False).eval()
    stage = {"name": "x", "learn": {"connector": 1e-3}, "data": "x.json", "steps": 1, "encoders_beside_update": True}
    model = nn.Module()
    model.model = SimpleNamespace(vision_tower=bank)  # type: ignore[assignment]
    plain = bank.encode_base
    beside, engine = EncoderStream(model, StageSpec.model_validate(stage), device), SimpleNamespace()
    size = 1 << (27 if cuda else 10)
    low = [torch.randn(size, device=device).bfloat16() for _ in range(2)]
    wide = [torch.zeros(size, device=device) for _ in range(3)]
    numbers = {"rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    undo, different, batches = beside.attach(engine), 0, 20 if cuda else 3
    for number in range(batches):
        info = {name: bank.infos[name].image for name in bank.encoders}
        pixels = {name: torch.randn(5 + number % 4, 3, its.height, its.width) for name, its in info.items()}
        given = pixels if not cuda else {name: tensor.pin_memory() for name, tensor in pixels.items()}
        for _ in range(8):
            scale = torch.ones((), device=device)
            (fused_update if cuda else reference_update)(*low, *wide, scale=scale, **numbers)
        moved = engine.to_device(Batch(**{**dict.fromkeys(Batch.__dataclass_fields__), "inputs": given}))
        found = bank.encode_base(moved.inputs)
        kept = {name: features.tokens.clone() for name, features in found.items()}
        del found, moved
        trash = [torch.full((1 << 22,), float(number), device=device) for _ in range(20)]
        wanted = plain({name: tensor.to(device) for name, tensor in pixels.items()})
        different += sum(not torch.equal(kept[name], wanted[name].tokens) for name in wanted)
        del trash
    undo()
    return {"batches": batches, "unequal features": different, "encoded there": beside.runs}


def attention(options: argparse.Namespace, folder: Path) -> dict:
    """Forward and backward over rows as the training packs them: 8 samples of about 1,050 tokens, 32 heads of 128."""
    import torch
    import torch.nn.attention.varlen as varlen

    from mllm.varlen import segment_attention

    if options.device != "cuda":
        return {}
    ends = [0, 1010, 2090, 3050, 4096, 5200, 6150, 7300, 8192]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
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

    reference = [t.detach().float() for t in once()]
    flops = 14 * 32 * 128 * sum((b - a) ** 2 for a, b in pairwise(ends)) / 2
    found: dict = {"torch ms": timed()}
    found["torch TFLOP/s"] = round(flops / found["torch ms"] / 1e9, 1)
    varlen._should_use_cudnn = lambda index: True  # the choice is torch's own and off there
    # Another number of samples would be another cuDNN plan, so that rows would be filled up with empty ones; are these right, too?
    for name, edges in {"cuDNN": bounds, "cuDNN, 8 empty": torch.cat([bounds, bounds[-1:].expand(8)])}.items():
        try:
            other = [t.detach().float() for t in once(edges)]
            pairs = zip(reference, other, strict=True)
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
    return of_trace(events, steps)


def of_trace(events: list[dict], steps: int) -> dict:
    """Milliseconds a step by kind of kernel, and of the gaps between them, the longest with what ran before and after."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in kinds)
    if not kernels:
        return {"kernels": 0}
    spent, idle, end, before = dict.fromkeys([*KINDS, "other"], 0.0), list[tuple[float, str, str]](), kernels[0][0], ""
    for start, stop, name in kernels:
        low = name.lower()
        spent[next((kind for kind, marks in KINDS.items() if any(mark in low for mark in marks)), "other")] += (
            stop - start
        )
        if start > end:
            idle.append((start - end, before, name))
        if stop > end:
            end, before = stop, name
    idle.sort(reverse=True)
    return {
        "ms a step": {kind: round(value / 1e3 / steps, 2) for kind, value in spent.items()},
        "between first and last": round((end - kernels[0][0]) / 1e3 / steps, 2),
        "no kernel runs": round(sum(gap for gap, _, _ in idle) / 1e3 / steps, 2),
        "longest gaps (ms, before, after)": [(round(gap / 1e3, 3), a[:50], b[:50]) for gap, a, b in idle[:12]],
    }


def training(options: argparse.Namespace, folder: Path, name: str) -> dict:
    short = "".join(c if c.isalnum() else "-" for c in name)
    own = {"encoders_beside_update": True} if name.startswith("beside") else {}
    seen = _watch(options, folder, short, steps=SKIP + STEPS, limit=SECTIONS[name], **own)
    shutil.rmtree(folder / short, ignore_errors=True)
    found = {key: seen.middle(key, SKIP) for key in ("seconds", "tokens_per_second", "memory_gb")}
    rates = sorted(step["tflops"]["language_model"] for step in seen.steps[SKIP:] if "tflops" in step)
    return {
        **{key: None if value is None else round(value, 4) for key, value in found.items()},
        "tflops": round(rates[len(rates) // 2], 1) if rates else None,
        "losses": [round(step["loss"], 4) for step in seen.steps[:3]],
        "steps seen": len(seen.steps),
    }


def _watch(options, folder: Path, name: str, *, steps: int, limit: float, arguments: tuple[str, ...] = (), **own):
    compiled = options.device == "cuda"
    recipe = write_recipe(
        folder, options.size, name=name, steps=200, num_workers=options.workers, compile=compiled, **own
    )
    limit = limit * options.patience - 5
    return watch(recipe, steps=steps, limit=limit, arguments=arguments, **compiled_in(folder))


def work(options: argparse.Namespace, folder: Path, name: str) -> dict:
    small = {"exact": exact, "attention": attention, "gaps": gaps}.get(name)
    return small(options, folder) if small else training(options, folder, name)


def main() -> None:
    workers = {"type": int, "default": 6, "help": "Processes that decode pictures."}
    rows = measure(__file__, __doc__, SECTIONS, work, limit=470.0, own={"workers": workers})
    for row in rows:
        if row.get("seconds"):
            print(
                f"{row['section']} | {1e3 * row['seconds']:.1f} ms | {row['tokens_per_second']:.0f} tok/s | {row['tflops']}"
            )


if __name__ == "__main__":
    main()
