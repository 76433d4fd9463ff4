"""Does `generate` answer the same on CUDA whichever way it is run: over two GPUs, offloaded, with other caches, compiled?

A small random model with two encoders in fp32 (TF32 off), three prompts (one picture, none, two), greedy. One JSON line a way: equal
to plain generation on one GPU, or what was raised. Also in $OUT/generate_devices.txt.

    python benchmarks/generate_devices.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import versions

TOKENS = 24


def main() -> None:
    from tests.helpers import picture, tiny_model

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    lines = [json.dumps(versions())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, processor = tiny_model(folder)
        model.save_pretrained(folder / "ours")
        processor.save_pretrained(folder / "ours")
        rows = [
            [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is it"}],
            [{"type": "text", "text": "which colour has it"}],
            [{"type": "image", "image": picture(2)}, {"type": "image", "image": picture(3)}, {"type": "text", "text": "and this"}],
        ]  # fmt: skip
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": row}] for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        wanted = answer(model, inputs)
        for label, opening, options in ways():
            start = time.perf_counter()
            try:
                found = answer(reopened(folder / "ours", folder / "offload", opening), inputs, **options)
                result: dict[str, Any] = {"equal to the CPU's": found == wanted}
            except Exception as error:
                result = {"raised": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            lines.append(json.dumps({"way": label, **result, "s": round(time.perf_counter() - start, 1)}))
            print(lines[-1], flush=True)
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "generate_devices.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ways() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What is tried: a name, how the checkpoint is opened, what `generate` is told."""
    one = {"device_map": {"": 0}}
    language = {"model.multi_modal_projector": 0, "model.language_model": 0, "lm_head": 0}
    encoders_on_cpu = {"model.vision_tower": "cpu", **language}
    result = [
        ("one GPU", one, {}),
        ("dynamic cache, offloaded", one, {"cache_implementation": "offloaded"}),
        ("static cache", one, {"cache_implementation": "static"}),
        ("quantised cache", one, {"cache_implementation": "quantized"}),
        ("compiled, Inductor", {**one, "compiled": True}, {"cache_implementation": "static"}),
        ("flex_attention", {**one, "attn_implementation": "flex_attention"}, {}),
        ("encoders on the CPU", {"device_map": encoders_on_cpu}, {}),
    ]  # fmt: skip
    if torch.cuda.device_count() > 1:
        pictures = {"model.vision_tower": 1, "model.multi_modal_projector": 1}
        apart = {**pictures, "model.language_model": 0, "lm_head": 0}
        tight = {0: "60KB", 1: "10GB"}
        result += [
            ("two GPUs, auto", {"device_map": "auto"}, {}),
            ("two GPUs, balanced", {"device_map": "balanced"}, {}),
            ("two GPUs, encoders apart", {"device_map": apart}, {}),
            ("two GPUs, little room on the first", {"device_map": "auto", "max_memory": tight}, {}),
            ("two GPUs, static cache", {"device_map": "balanced"}, {"cache_implementation": "static"}),
        ]
    return result


def reopened(checkpoint: Path, offload: Path, opening: dict[str, Any]) -> Any:
    """The checkpoint opened that way."""
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    options = {k: v for k, v in opening.items() if k != "compiled"}
    model = MllmForConditionalGeneration.from_pretrained(checkpoint, offload_folder=str(offload), **options).eval()
    if opening.get("compiled"):
        model.forward = torch.compile(model.forward)
    return model


def answer(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    cuda = any(p.device.type != "cpu" for p in model.parameters())  # offloaded weights say "meta"
    given = {k: v.to("cuda:0" if cuda else "cpu") for k, v in inputs.items()}
    output = model.generate(**given, **settings)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    main()
