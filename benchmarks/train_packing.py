"""How many useful tokens a second do padded, grouped and packed rows give, on a realistic mix of lengths?

Random weights; samples of 60 to 1800 tokens (log-normal, median 350, as instruction data), text only (images change
what a sample costs, not how rows fill). The same samples are trained on as padded rows, as rows grouped by length, and
packed into rows of 4096; useful means not padding. Prints one JSON line a variant. Goal on one H200: packed at least
1.9 times padded.

    python benchmarks/train_packing.py --size 1b --steps 12
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

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ROW = 4096


def sample_lengths(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.exp(torch.randn(count, generator=generator) * 0.8 + 5.86).clamp(60, 1800).long()
    return text.tolist()


def batches(lengths: list[int], kind: str, tokens: int):
    """Lists of rows, each a list of sample lengths; about ``tokens`` slots a batch."""
    from mllm.data.packing import pack

    if kind == "packed":
        rows = [[lengths[i] for i in row] for row in pack(lengths, ROW)]
        step = max(1, tokens // ROW)
        return [rows[k : k + step] for k in range(0, len(rows) - step + 1, step)]
    order = sorted(lengths) if kind == "grouped" else lengths
    rows_per_batch = max(1, tokens // 1024)
    return [
        [[n] for n in order[k : k + rows_per_batch]] for k in range(0, len(order) - rows_per_batch + 1, rows_per_batch)
    ]


def inputs_of(rows: list[list[int]], kind: str, device: torch.device, vocabulary: int) -> dict:
    """Model arguments as the collator and the trainer make them."""
    from mllm.data.collate import collate, collate_packed
    from mllm.processing.chat import EncodedSample
    from mllm.train import attention
    from mllm.train.data import PADDED_TO
    from mllm.train.prepare import attention_inputs

    def sample(length: int) -> EncodedSample:
        ids = torch.randint(5, vocabulary, (length,))
        labels = ids.clone()
        labels[: length * 6 // 10] = -100
        return EncodedSample("x", "x", ids, labels)

    if kind == "packed":
        batch = collate_packed([[sample(n) for n in row] for row in rows], max_length=ROW, pad_token_id=0)
    else:
        batch = collate([sample(row[0]) for row in rows], pad_token_id=0, pad_to_multiple_of=PADDED_TO)
    return attention_inputs(batch.to(device), attention.NAME if kind == "packed" or device.type == "cuda" else "sdpa")


def measure(kind: str, options: argparse.Namespace, device: torch.device) -> dict:
    from transformers import LlamaConfig

    from mllm.models.compilation import compile_layers, tell_uncompiled
    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.train import attention

    attention.register()
    torch.manual_seed(0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        text = LlamaConfig(vocab_size=options.vocabulary, max_position_embeddings=ROW, **SIZES[options.size])
        model = MllmForConditionalGeneration(MllmConfig(text_config=text.to_dict()))
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(
        {"text_config": attention.NAME if kind == "packed" or device.type == "cuda" else "sdpa"}
    )
    uncompiled: list[str] = []
    if options.compile:
        torch.compiler.reset()  # what another kind compiled is no start for this one
        tell_uncompiled(uncompiled.append)
        compile_layers(model, fixed_length=kind == "packed")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    lengths = sample_lengths(options.samples, seed=1)
    plan = batches(lengths, kind, options.tokens)
    generator = torch.Generator().manual_seed(2)
    plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()][: options.steps + options.warmup]
    useful = slots = 0
    started, began = 0.0, time.perf_counter()
    # Every number of samples and longest one is a shape: none is to be compiled while timed.
    for rows in plan if options.compile else ():
        model(**inputs_of(rows, kind, device, options.vocabulary), skip_logits=True).loss.backward()
        optimizer.zero_grad(set_to_none=True)
    compiling = time.perf_counter() - began
    for number, rows in enumerate(plan):
        if number == options.warmup:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        arguments = inputs_of(rows, kind, device, options.vocabulary)
        model(**arguments, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= options.warmup:
            useful += sum(sum(row) for row in rows)
            slots += arguments["input_ids"].numel()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    result = {
        "kind": kind,
        "size": options.size,
        "useful_tokens_per_second": round(useful / seconds),
        "slots_per_second": round(slots / seconds),
        "fill": round(useful / slots, 4),
        "ms_per_step": round(1e3 * seconds / max(len(plan) - options.warmup, 1), 1),
    }
    if options.compile:
        result |= {"seconds_to_compile": round(compiling, 1), "left_uncompiled": uncompiled[:1]}
    if device.type == "cuda":
        result["memory_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--tokens", type=int, default=16384, help="slots of a packed batch; 1024 a row when padded")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=["padded", "grouped", "packed"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = None
    for kind in options.kinds:
        result = measure(kind, options, device)
        base = base or result["useful_tokens_per_second"]
        print(json.dumps({**result, "times_first": round(result["useful_tokens_per_second"] / base, 3)}), flush=True)


if __name__ == "__main__":
    main()
