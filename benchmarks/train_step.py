"""How fast is one full fine-tuning step on a GPU, beside transformers' own LLaVA?

Random weights, bf16, fused AdamW with bf16 states, 4 rows of 2048 tokens with one 576-token image each, frozen encoders run live.
Reference: `transformers.LlavaForConditionalGeneration` (CLIP-L/336 + 7B), eager and with each layer compiled. Ours: CLIP-L/336 +
DINOv2-L joined on channels, eager and compiled. FLOPs: 6 N T of the language model's matmul weights plus causal attention
(6 L d sum s²), over the whole step's wall time; encoders' FLOPs are not counted.

    python benchmarks/train_step.py            # prints one JSON line per variant and a profile of the fastest
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
IMAGE_ID, IMAGE_TOKENS = 32000, 576


def reference():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {k: v for k, v in CLIP_L.items() if k != "model_type"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=32064, **LLAMA_7B, max_position_embeddings=4096),
        image_token_index=IMAGE_ID,
    )
    return LlavaForConditionalGeneration(config)


def ours(encoders: dict):
    from mllm.models.build import build_config
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.recipe import ModelSpec

    spec = ModelSpec.model_validate(
        {
            "language_model": {
                "config": {"model_type": "llama", "vocab_size": 32064, **LLAMA_7B, "max_position_embeddings": 4096}
            },
            "encoders": encoders,
            "connector": {"type": "channel_concat", "grid": [24, 24], "projector": {"depth": 2}},
        }
    )
    return MllmForConditionalGeneration(build_config(spec, image_token_id=IMAGE_ID))


TWO = {
    "semantic": {"preset": "clip-vit-l-14-336", "layers": [-2], "final_norm": False},
    "spatial": {"preset": "dinov2-l", "image_size": 336, "layers": [-1]},
}


def batch(model, *, rows: int, length: int, ids_seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(ids_seed)
    ids = torch.randint(10, 31000, (rows, length), generator=generator)
    ids[:, 5 : 5 + IMAGE_TOKENS] = IMAGE_ID
    labels = ids.clone()
    labels[:, : length * 6 // 10] = -100  # a question and its image; 40 % of the row is learned from
    keys = getattr(getattr(model, "model", model), "pixel_keys", {"vision": "pixel_values"})
    pixels = {key: torch.randn(rows, 3, 336, 336, generator=generator).cuda().bfloat16() for key in keys.values()}
    return {"input_ids": ids.cuda(), "labels": labels.cuda(), **pixels}


def matmul_rate(seconds: float) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        count += 20
    return count * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def measure(
    name: str, make, *, compiled: bool, chunked_loss: bool, rows: int, length: int, steps: int, profile: bool = False
) -> dict:
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = make()
    torch.set_default_dtype(torch.float32)
    tower = model.model.vision_tower
    tower.requires_grad_(False)
    model.train()
    if hasattr(model.config, "encoders"):
        from mllm.models.compilation import compile_layers

        if compiled:
            compile_layers(model)
    elif compiled:
        for layer in [*model.model.language_model.layers, *tower.encoder.layers]:
            layer.compile(dynamic=False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
    inputs = batch(model, rows=rows, length=length)
    extra = {"skip_logits": True} if chunked_loss else {}

    def step() -> torch.Tensor:
        loss = model(**inputs, use_cache=False, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses = [float(step())]
    first = time.perf_counter() - started
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    text = model.config.text_config
    d, layers, ff = text.hidden_size, text.num_hidden_layers, text.intermediate_size
    weights = layers * (4 * d * d + 3 * d * ff) + text.vocab_size * d
    flops = 6 * weights * rows * length + 6 * layers * d * rows * length**2
    result = {
        "variant": name, "compiled": compiled, "rows": rows, "length": length, "ms": round(median * 1e3, 1),
        "tokens_per_s": round(rows * length / median), "tflops": round(flops / median / 1e12, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1), "first_step_s": round(first, 1), "loss": losses[0],
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    if profile:
        profile_step(step)
    return result


def profile_step(step) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    groups = {
        "matmul": 0.0,
        "attention": 0.0,
        "adam": 0.0,
        "loss": 0.0,
        "fused elementwise": 0.0,
        "copy": 0.0,
        "other": 0.0,
    }
    for event in prof.key_averages():
        name, spent = event.key.lower(), event.self_device_time_total / 1e3
        kind = (
            "matmul" if any(k in name for k in ("gemm", "nvjet", "cutlass", "xmma", "cublas")) and "fmha" not in name
            else "attention" if any(k in name for k in ("attention", "fmha", "flash", "sdpa", "cudnn"))
            else "adam" if "adam" in name or "multi_tensor" in name
            else "loss" if "softmax" in name or "nll" in name or "cross" in name
            else "fused elementwise" if name.startswith("triton")
            else "copy" if "memcpy" in name or "memset" in name or "copy" in name
            else "other"
        )  # fmt: skip
        groups[kind] += spent
    print(json.dumps({"kernel_ms": {k: round(v, 1) for k, v in groups.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    import transformers

    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )
    print(json.dumps({"matmul_tflops_sustained_8s": round(matmul_rate(8.0), 1)}), flush=True)
    shape = {"rows": arguments.rows, "length": arguments.length, "steps": arguments.steps}
    variants = [
        ("transformers LLaVA, one encoder", reference, {"compiled": False, "chunked_loss": False}),
        ("ours, two encoders", lambda: ours(TWO), {"compiled": False, "chunked_loss": True}),
        ("transformers LLaVA, one encoder", reference, {"compiled": True, "chunked_loss": False}),
        ("ours, two encoders", lambda: ours(TWO), {"compiled": True, "chunked_loss": True, "profile": True}),
    ]
    results = []
    for name, make, options in variants:
        try:
            results.append(measure(name, make, **shape, **options))
        except Exception as error:  # one variant's failure must not lose the others' figures
            print(
                json.dumps({"variant": name, **options, "error": repr(error)[:500]}),
                flush=True,
            )
    by = {(r["variant"], r["compiled"]): r["tokens_per_s"] for r in results}
    base = by.get(("transformers LLaVA, one encoder", False))
    if base:
        print(
            json.dumps(
                {
                    "ratio to transformers eager": {
                        f"{k[0]}, {'compiled' if k[1] else 'eager'}": round(v / base, 3) for k, v in by.items()
                    }
                }
            )
        )


if __name__ == "__main__":
    main()
