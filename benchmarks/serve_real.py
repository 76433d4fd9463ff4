"""Does vLLM answer questions about real charts as `generate` does, for a model of published parts, merged and with an adapter beside it?

    python benchmarks/serve_real.py CKPT CHARTS [--cases 56] [--tokens 16]

CKPT: a checkpoint of the recipe real_charts or real_charts_small (a few steps are enough: equality needs no learning). CHARTS: a folder of
charts with test.jsonl, as `mllm data rebuild real_charts` makes it. The adapter is trained here, one step of PEFT's LoRA on the language
model. CPU, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))


def questions(folder: Path, count: int) -> list[dict[str, Any]]:
    """So many rows of test.jsonl, evenly over it, the renderers in turn."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    renderers = sorted({row["renderer"] for row in rows})
    of = {name: [row for row in rows if row["renderer"] == name] for name in renderers}
    return [
        of[name][int((k + 0.5) * len(of[name]) * len(renderers) / count)]
        for k in range(count // len(renderers))
        for name in renderers
    ]


def train_adapter(checkpoint: str, cases: list[Any], answers: list[str], folder: Path) -> float:
    """One step of LoRA on the language model on four questions, saved as PEFT does; returns the loss before it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.serve.traces import model_inputs

    processor = AutoProcessor.from_pretrained(checkpoint)
    model: Any = MllmForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):  # the first step of a fresh LoRA moves one of its two factors alone
        optimizer.zero_grad()
        for case, answer in zip(cases[:4], answers[:4], strict=True):
            _, inputs = model_inputs(processor, case)
            own = torch.tensor([processor.tokenizer(answer).input_ids])
            labels = torch.cat([torch.full_like(inputs["input_ids"], -100), own], dim=1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], own], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            loss = model(**inputs, labels=labels).loss
            (loss / 4).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
    model.save_pretrained(str(folder))
    return sum(losses[:4]) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("charts", type=Path)
    parser.add_argument("--cases", type=int, default=56)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", choices=["merged", "adapter"], help="default: both, one engine after the other")
    arguments = parser.parse_args()
    import torch
    import vllm

    from mllm.serve.parity import run_parity
    from mllm.serve.traces import Case
    from mllm.types import IMAGE_MARK, Turn

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = questions(arguments.charts, arguments.cases)
    cases = [
        Case(row["id"], [Turn("user", f"{IMAGE_MARK}\n{row['question']}")], [_open(arguments.charts / row["image"])])
        for row in rows
    ]
    print(
        f"{len(cases)} questions, vLLM {vllm.__version__}, torch {torch.__version__}, {arguments.tokens} tokens each, float32, CPU"
    )
    engine = {"max_model_len": 1024, "block_size": 32}
    for kind in [arguments.only] if arguments.only else ["merged", "adapter"]:
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            place = arguments.checkpoint
            if kind == "adapter":
                loss = train_adapter(place, cases, [row["answer"] for row in rows], Path(folder))
                print(f"adapter: trained on four questions, loss before {loss:.2f}")
                place = folder
            differences, moved = run_parity(
                place, cases, num_tokens=arguments.tokens, device="cpu", engine=engine, unmerged=kind == "adapter"
            )
        for path in dict.fromkeys(d.path for d in differences):
            chosen = [d for d in differences if d.path == path]
            other = [f"{d.case}: first other token {d.first}, {'; '.join(d.notes)}" for d in chosen if not d.same]
            print(
                f"{kind:8} {path:28} equal {sum(d.same for d in chosen)}/{len(chosen)}  gap {max(d.gap for d in chosen):.1e}  {other[:4]}",
                flush=True,
            )
        print(
            f"{kind:8} another picture moves a logit: {', '.join(f'{n} {v:.2f}' for n, v in moved.items())}; {time.time() - started:.0f} s"
        )


def _open(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


if __name__ == "__main__":
    main()
