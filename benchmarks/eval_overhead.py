"""How much longer does an evaluation take than bare generation on the same prompts?

Bare: open each picture, processor, ``model.generate``, decode, in a plain loop. Harness: the whole of `evaluate` on the same questions
in the same batches, pictures read from disk: reading ahead, hashing, thumbnails, scoring by three metrics, one synced JSON line a
sample, intervals. The two alternate, round by round, in one process; the overhead is the median over rounds of harness/bare - 1, in
wall time and in CPU time (which other work on the machine disturbs less). A random dual-encoder model answers with exactly
``--tokens`` tokens. The hash over all weights, made once for a model, is timed apart.

    OMP_NUM_THREADS=1 python benchmarks/eval_overhead.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from mllm.eval.data.loading import load_data
from mllm.eval.generators.hf import HFGenerator
from mllm.eval.run import evaluate
from mllm.eval.task import load_task
from mllm.processing.chat import render_prompt
from tests.helpers import tiny_model

LLM = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8,
       "vocab_size": 320, "model_type": "llama", "max_position_embeddings": 2048}  # fmt: skip
VIT = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


def build(folder: Path) -> tuple[Any, Any]:
    """42 M parameters, two encoders of 224 and 112 pixels, 196 visual tokens an image."""

    def encoder(size: int, patch: int) -> dict[str, Any]:
        return {"type": "hf", "architecture": {**VIT, "image_size": size, "patch_size": patch}, "layers": [-2]}

    return tiny_model(
        folder, language_model={"config": LLM, "tokenizer": str(folder)},
        encoders={"semantic": encoder(224, 16), "detail": encoder(112, 8)},
    )  # fmt: skip


def questions(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator, rows = np.random.default_rng(0), []
    for k in range(count):
        small = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=90)
        rows.append(
            {
                "id": f"q{k}",
                "image": f"{k}.jpg",
                "question": f"How high is bar {k}, counted from the left?",
                "answer": "5",
                "kind": "a",
            }
        )
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def bare(model: Any, processor: Any, folder: Path, order: list[list[Any]], options: dict[str, Any]) -> list[str]:
    """Answers of the plain loop."""
    texts = []
    for batch in order:
        images = [[Image.open(folder / item.meta["file"]).convert("RGB")] for item in batch]
        prompts = [render_prompt(processor, item.turns) for item in batch]
        inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id, **options)
        texts += processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, processor = build(place / "tokenizer")
        model.generation_config.eos_token_id = None  # every answer has the same length
        folder = questions(place / "data", arguments.samples)
        task = load_task("demo_charts", [f"generation.max_new_tokens={arguments.tokens}"])
        generator = HFGenerator(model, processor, batch_size=arguments.batch_size)
        started = time.perf_counter()
        generator.fingerprint()
        hashing = time.perf_counter() - started
        data = load_data(task, data={"demo_charts": folder})
        for item in data.items:
            item.meta["file"] = item.pictures[0].source.name
        ordered = sorted(data.items, key=lambda item: -len(item.turns[-1].content))
        batches = [ordered[k : k + arguments.batch_size] for k in range(0, len(ordered), arguments.batch_size)]
        options = {"max_new_tokens": arguments.tokens}

        def timed(run: Any) -> tuple[float, float, Any]:
            wall, cpu = time.perf_counter(), time.process_time()
            result = run()
            return time.perf_counter() - wall, time.process_time() - cpu, result

        def harness() -> Any:
            shutil.rmtree(place / "out", ignore_errors=True)
            return evaluate(generator, [task], place / "out", data={"demo_charts": folder}, progress=False)

        def plain() -> Any:
            return bare(model, processor, folder, batches, options)

        plain(), harness()  # warm up
        rows = []
        for k in range(arguments.rounds):
            first, second = (plain, harness) if k % 2 == 0 else (harness, plain)
            one, two = timed(first), timed(second)
            a, b = (one, two) if k % 2 == 0 else (two, one)
            rows.append({"bare_wall": a[0], "harness_wall": b[0], "bare_cpu": a[1], "harness_cpu": b[1]})
        texts = sorted(text.strip() for text in a[2])
        said = [json.loads(line)["output"] for line in (place / "out/demo_charts.jsonl").read_text().splitlines()]
        assert sorted(said) == texts, "the two answered differently"
    result = {
        "samples": arguments.samples, "batch_size": arguments.batch_size, "tokens": arguments.tokens, "rounds": rows,
        "parameters_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 1), "hash_seconds": round(hashing, 3),
        "bare_ms_per_sample": round(1000 * statistics.median(r["bare_wall"] for r in rows) / arguments.samples, 2),
    }  # fmt: skip
    for kind in ("wall", "cpu"):
        ratios = [r[f"harness_{kind}"] / r[f"bare_{kind}"] - 1 for r in rows]
        extra = [(r[f"harness_{kind}"] - r[f"bare_{kind}"]) / arguments.samples for r in rows]
        percent, more = 100 * statistics.median(ratios), 1000 * statistics.median(extra)
        result |= {f"overhead_{kind}_percent": round(percent, 2), f"overhead_{kind}_ms_per_sample": round(more, 2)}
        shown = " ".join(f"{100 * ratio:+.1f}" for ratio in ratios)
        print(f"{kind}: median overhead {percent:+.2f} % ({more:+.2f} ms a sample), rounds {shown}")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
