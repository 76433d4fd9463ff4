"""Is AdamW with fewer bytes of state (`master: low_bits`, `moments: bfloat16`) right on a GPU, how fast, and what becomes of the loss?

check: the Triton kernel against the plain update on the CPU and against the kernel of the float32 copies: masters bit for bit, weights
against the nearest, moments by the share of coins that fell otherwise. speed: clip and update over tensors of a 7B's shapes. loss: a small
Llama learns the bytes of this repository's texts with each way of keeping the state, beside the usual one with another order of the data.

    python benchmarks/train_compact.py                             # one GPU: check and speed, under a minute; exit status 1 if not right
    python benchmarks/train_compact.py --sections check,speed,loss # about 4 minutes; also $OUT/train_compact.txt
    python benchmarks/train_compact.py --device cpu --sections loss --steps 300   # what a CPU can say, about 4 minutes
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from mllm.recipe import OptimizerSpec
from mllm.train.engine.compact_adamw import CompactAdamW, join_bits
from mllm.train.engine.optim import MasterWeights, build_optimizer

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, dict] = {
    "float32": {},
    "low_bits": {"master": "low_bits"},
    "moments bf16": {"moments": "bfloat16"},
    "low_bits, moments bf16": {"master": "low_bits", "moments": "bfloat16"},
}
PARAMETERS_7B = 6_738_939_904


def optimizer_of(model: nn.Module, rate: float, **settings) -> MasterWeights | CompactAdamW:
    from mllm.train.engine.groups import Group

    names = tuple(name for name, _ in model.named_parameters())
    groups = [Group("language_model", rate, 0.1, names, sum(p.numel() for p in model.parameters()))]
    return build_optimizer(model, groups, OptimizerSpec(betas=(0.9, 0.95), **settings), master=True)


def weights_of(optimizer) -> list[torch.Tensor]:
    copies = [copy for group in optimizer.param_groups for copy in group["params"]]
    return [(optimizer.weights(c) if isinstance(optimizer, CompactAdamW) else c.detach()).cpu() for c in copies]


def check(options: argparse.Namespace) -> dict:
    """20 clipped updates of tensors that fill the kernel's blocks and tensors that do not."""
    shapes = [(7,), (65536,), (70001,), (1031, 517)]
    found, right = {}, True

    def make(device: str, **settings):
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]).to(device)
        optimizer = optimizer_of(model, 1e-3, **settings)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for p in model:
                p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (step % 5 - 3)).bfloat16().to(device)
            optimizer.step(torch.full((), 1.0 / (1 + step % 3), device=device))
        return model, optimizer

    copies, cpu_copies = make(options.device)[1], weights_of(make("cpu")[1])
    for name, settings in list(WAYS.items())[1:]:
        model, ours = make(options.device, **settings)
        reference = make("cpu", **settings)[1]
        narrow = "moments" in settings
        on_gpu, on_cpu, usual = weights_of(ours), weights_of(reference), weights_of(copies)
        largest = max(float(w.abs().max()) for w in on_cpu)
        plain = max(float((a - b).abs().max()) for a, b in zip(usual, cpu_copies)) / largest
        parts = {
            "kernel runs": ours.fused,
            "masters, largest difference from the CPU, of the largest weight": max(
                float((a - b).abs().max()) / largest for a, b in zip(on_gpu, on_cpu)
            ),
            "the float32 copies' kernel, the same difference": plain,
            "masters equal to the float32 copies' kernel, share": sum(
                int((a == b).sum()) for a, b in zip(on_gpu, usual)
            )
            / sum(a.numel() for a in usual),
            "weights that are not the nearest bf16": max(
                float(((p.float().cpu() - w).abs() > (w.bfloat16().float() - w).abs()).float().mean())
                for p, w in zip(model, on_gpu)
            ),
        }
        states = list(zip(ours.state.values(), reference.state.values()))
        for key in ("exp_avg", "exp_avg_sq"):
            pairs = [(a[key].cpu(), b[key]) for a, b in states]
            if narrow:
                different = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
                parts[f"{key}, share of bf16 values that differ from the CPU's"] = different
            else:
                scale = max(float(b.abs().max()) for _, b in pairs)
                parts[f"{key}, largest difference from the CPU, of the largest"] = max(
                    float((a - b).abs().max()) / scale for a, b in pairs
                )
        # One coin that fell otherwise moves a moment by a bf16 step, and the weight after it.
        limit = 2e-3 if narrow else max(1e-6, 1.5 * plain)
        ok = parts["masters, largest difference from the CPU, of the largest weight"] <= limit
        ok &= parts["weights that are not the nearest bf16"] == 0
        ok &= narrow or parts["masters equal to the float32 copies' kernel, share"] > 1 - 1e-5
        ok &= all(value <= (2e-2 if narrow else 1e-6) for key, value in parts.items() if key.startswith("exp_avg"))
        if "master" in settings:
            joined = [join_bits(p, ours.low[id(p)]).cpu() for p in model]
            ok &= all(torch.equal(a, b) for a, b in zip(joined, on_gpu))
        found[name] = {**parts, "right": ok}
        right &= ok
    return {"right": right, **found}


def speed(options: argparse.Namespace) -> dict:
    """The update's time and the bytes of what it keeps, by the shapes of a 7B's 12 layers, and for a whole 7B."""
    cuda = options.device == "cuda"
    width, wide, layers = (4096, 11008, 12) if cuda else (64, 128, 2)
    shapes = [*[(width, width)] * 4, *[(wide, width)] * 2, (width, wide), (width,), (width,)] * layers
    result = {}
    for name, settings in WAYS.items():
        with torch.device(options.device):
            model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes])
        optimizer = optimizer_of(model, 1e-5, **settings)
        count, times = sum(p.numel() for p in model), []
        scale = torch.full((), 0.5, device=options.device)
        for _ in range(10):
            for parameter in model:
                parameter.grad = torch.full_like(parameter, 1e-3)
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            optimizer.step(scale)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        kept = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
        kept += sum(t.numel() * t.element_size() for t in getattr(optimizer, "low", {}).values())
        kept += sum(t.numel() * t.element_size() for t in optimizer.masters)
        seconds = sorted(times[3:])[3]
        result[name] = {
            "ms for 7B": round(1e3 * seconds * PARAMETERS_7B / count, 1),
            "bytes kept a weight": round(kept / count, 2),
            "GB for 7B, weights and gradients with them": round((kept / count + 4) * PARAMETERS_7B / 1e9, 1),
        }
        del model, optimizer
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return result


def loss(options: argparse.Namespace) -> dict:
    """Bits a byte of held-out text after learning; `float32, other order` tells what chance alone makes of it."""
    files = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("mllm/**/*.py")])
    text = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    held = text[-len(text) // 20 :]
    text = text[: -len(text) // 20]
    ways = {**WAYS, "float32, other order": {}, "moments bf16, other order": {"moments": "bfloat16"}}
    return {
        name: _learned(options, text, held, order=1 if "other" in name else 0, **settings)
        for name, settings in ways.items()
    }


def _learned(options: argparse.Namespace, text: torch.Tensor, held: torch.Tensor, *, order: int, **settings) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    cuda = options.device == "cuda"
    width, layers, rows, length = (512, 8, 64, 512) if cuda else (96, 3, 8, 128)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).bfloat16().to(options.device)
    optimizer = optimizer_of(model, 1e-3, **settings)
    generator = torch.Generator().manual_seed(order)
    losses, began = [], time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / options.steps)
        starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
        batch = torch.stack([text[s : s + length] for s in starts.tolist()]).to(options.device)
        out = model(input_ids=batch, labels=batch).loss
        out.backward()
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad.float()) for p in model.parameters() if p.grad is not None])
        )
        optimizer.step((1.0 / (norm + 1e-6)).clamp(max=1.0))
        losses.append(out.detach().float())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        places = range(0, len(held) - length, max(length, len(held) // 200))
        tests = torch.stack([held[s : s + length] for s in places]).to(options.device)
        tested = [float(model(input_ids=part, labels=part).loss) for part in tests.split(rows)]
    last = torch.stack(losses[-50:])
    return {
        "loss of the last 50 steps": round(float(last.mean()), 5),
        "held-out loss": round(sum(tested) / len(tested), 5),
        "losses of steps 1, 10, 100": [round(float(losses[k - 1]), 4) for k in (1, 10, 100) if k <= len(losses)],
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--sections", default="check,speed")
    parser.add_argument("--steps", type=int, default=800, help="of section loss")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    lines = [f"{date.today()}, {where}, torch {torch.__version__}"]
    print(lines[0], flush=True)
    wrong = False
    for name in options.sections.split(","):
        found = {"check": check, "speed": speed, "loss": loss}[name](options)
        wrong |= found.get("right") is False
        for key, value in found.items():
            lines.append(f"{name} | {key} | {json.dumps(value)}")
            print(lines[-1], flush=True)
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "train_compact.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
