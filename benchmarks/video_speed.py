"""How fast does a model with a real-sized encoder see clips and learn from them, and in what memory? One GPU, no downloads.

    python benchmarks/video_speed.py --output benchmarks/results/video_speed_h200.txt
    python benchmarks/video_speed.py --small       # tiny parts on a CPU, to try the script; its figures say nothing

CLIP-L/14 at 336 px, 64 tokens a frame (average_pool 8 × 8), a language model of Qwen2.5-1.5B's sizes; random weights made on the device,
bf16. The clips are noise in memory: nothing is decoded or resized inside what is timed. A training step is the whole of it (forward,
backward, AdamW on the connector and the language model, encoder frozen, language model recomputed layer by layer); its first loss is
printed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECTIONS = ["seen", "trained", "memory"]
FRAMES, GRID = 32, 8
MEMORY_FRAMES = (8, 16, 32, 64, 128)
_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
}
_TEXT = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
_SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
}
_SMALL_TEXT = {
    **_TEXT,
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(folder: Path, frames: int, small: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from mllm.models.build import build_model
    from tests.helpers import tiny_spec, tiny_tokenizer

    tiny_tokenizer().save_pretrained(str(folder))
    shape = {"model_type": "clip_vision_model", "patch_size": 14, **(_SMALL_CLIP if small else _CLIP)}
    spec = tiny_spec(
        str(folder),
        language_model={"config": _SMALL_TEXT if small else _TEXT, "tokenizer": str(folder)},
        encoders={"frames": {"type": "hf", "image_size": shape["image_size"], "layers": [-2], "architecture": shape}},
        connector={"type": "average_pool", "grid": [GRID, GRID]},
        video={"frames": frames},
    )
    torch.manual_seed(0)
    model, processor = build_model(spec, dtype=dtype, device=device)
    model.model.vision_tower.requires_grad_(False)
    return model, processor


def batch_of(processor: Any, frames: int, side: int, clips: int, device: torch.device) -> dict[str, Any]:
    """The same clip of noise so many times, as a training step is given it."""
    from mllm.data.collate import collate
    from mllm.processing.chat import encode_sample
    from mllm.types import IMAGE_MARK, Sample, Turn, Video

    noise = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    turns = [Turn("user", f"{IMAGE_MARK}\nWhat happens?"), Turn("assistant", "Noise falls on a grey wall. " * 4)]
    sample = encode_sample(processor, Sample("clip", turns, [Video(noise, fps=2.0)]))
    return collate([sample] * clips, pad_token_id=0).to(device).inputs


def timed(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of a call after two."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for number in range(repeats + 2):
        wait()
        began = time.perf_counter()
        step()
        wait()
        if number >= 2:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def trainer(model: Any, batch: dict[str, Any]) -> Callable[[], float]:
    """One whole training step."""
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-5, fused=learns[0].is_cuda)
    model.train()
    model.model.language_model.gradient_checkpointing_enable()

    def step() -> float:
        loss = model(**batch, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    device = torch.device(options.device)
    dtype = torch.float32 if options.small else torch.bfloat16
    side = (_SMALL_CLIP if options.small else _CLIP)["image_size"]
    frames, model, processor = 4 if options.small else FRAMES, None, None
    with tempfile.TemporaryDirectory() as folder:
        if "seen" in options.sections or "trained" in options.sections:
            model, processor = build(Path(folder), frames, options.small, device, dtype)
        for clips in ((1, 4) if options.small else (1, 4, 8, 16)) if "seen" in options.sections else ():
            batch = batch_of(processor, frames, side, clips, device)
            given = {k: v for k, v in batch.items() if k in ("pixel_values", "video_times")}
            with torch.inference_mode():
                seconds = timed(partial(model.model.get_image_features, **given), options.repeats, device)
            rates = f"{clips / seconds:7.2f} clips/s, {clips * frames / seconds:7.0f} frames/s"
            say(f"seen:    {clips:3d} clips of {frames} frames at once: {rates}")
        for clips in ((1, 2) if options.small else (1, 4, 8)) if "trained" in options.sections else ():
            batch = batch_of(processor, frames, side, clips, device)
            tokens, step = batch["input_ids"].numel(), trainer(model, batch)
            first = float(step())
            seconds = timed(step, options.repeats, device)
            say(
                f"trained: {clips:3d} clips of {frames} frames a step: {tokens / seconds:8.0f} tokens/s ({tokens} a step), "
                f"{clips / seconds:6.2f} clips/s, {seconds * 1e3:.0f} ms{_peak(device)}, first loss {first:.3f}"
            )
        for count in ((2, 4) if options.small else MEMORY_FRAMES) if "memory" in options.sections else ():
            model = step = None
            gc.collect()  # the one before is gone when the next is built: encoders and their hooks hold each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
            model, processor = build(Path(folder), count, options.small, device, dtype)
            batch = batch_of(processor, count, side, 1, device)
            step = trainer(model, batch)
            step()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            held = f" ({torch.cuda.memory_allocated() / 2**30:.1f} between steps)" if device.type == "cuda" else ""
            tokens = batch["input_ids"].numel()
            say(f"memory:  one clip of {count:4d} frames, {tokens:6d} tokens, a training step{_peak(device)}{held}")
            del model, step


def _peak(device: torch.device) -> str:
    return f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what is measured")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    kind = "fp32, tiny" if options.small else "bf16"
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if options.output is not None:
            options.output.write_text("\n".join([*lines, ""]), encoding="utf-8")

    say(f"{date.today()} · video_speed.py · {where} · torch {torch.__version__} · {kind}")
    measure(options, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
