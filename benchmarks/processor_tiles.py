"""How many large pictures does one CPU core make into tiles a second, beside transformers' LLaVA-NeXT processors?

A picture is a 2000 × 1500 JPEG, seen in 3 × 4 tiles of 336 pixels and a thumbnail. Both decode it; seconds are of this process's CPU.

    python benchmarks/processor_tiles.py [--pictures 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.processing.image_processor import MllmImageProcessor

SIDE, GRID = 336, (3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="Each way in turn, so often; the median counts.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [jpeg(seed) for seed in range(options.pictures)]
    settings: dict[str, Any] = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": [[GRID[0] * SIDE, GRID[1] * SIDE]],
    }
    kinds = ("torch", "pil")
    ours = {
        kind: MllmImageProcessor(
            encoders={"vision": {"height": SIDE, "width": SIDE}},
            layout={"num_tokens": 576, "grid": (24, 24)},
            views={"type": "tiles", "grids": [list(GRID)]},
            resampler=kind,
        )
        for kind in kinds
    }
    ways: dict[str, Any] = {
        "ours, resampler torch": ours["torch"],
        "ours, resampler pil": ours["pil"],
        "transformers, torchvision": LlavaNextImageProcessor(**settings),
        "transformers, PIL": LlavaNextImageProcessorPil(**settings),
    }
    tasks: dict[str, Callable[[bytes], Any]] = {name: partial(views_of, processor) for name, processor in ways.items()}
    tasks["JPEG decoding alone, which is in all of them"] = lambda file: Image.open(io.BytesIO(file)).load()
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(options.rounds):  # in turn: whatever else the machine does meets all of them
        for name, once in tasks.items():
            found[name].append(rate(once, files))
    rates = {name: statistics.median(values) for name, values in found.items()}
    for name, value in rates.items():
        spread = f"{min(found[name]):.2f} to {max(found[name]):.2f}"
        print(f"{value:6.2f} pictures a second and core ({spread})  {name}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1))


def views_of(processor: Any, file: bytes) -> Any:
    """A decoded picture's pixels; fails where they are not 13 views."""
    pixels = processor(Image.open(io.BytesIO(file)), return_tensors="pt")["pixel_values"]
    assert pixels.numel() == (1 + GRID[0] * GRID[1]) * 3 * SIDE * SIDE, pixels.shape
    return pixels


def rate(once: Callable[[bytes], Any], files: list[bytes]) -> float:
    """Pictures per second of CPU, the first one not counted."""
    once(files[0])
    started = time.process_time()
    for file in files:
        once(file)
    return len(files) / (time.process_time() - started)


def jpeg(seed: int) -> bytes:
    """A picture with detail at several scales, about as large as a photograph's file."""
    random = np.random.default_rng(seed)
    layers = [Image.fromarray(random.integers(0, 256, (n * 3, n * 4, 3), dtype=np.uint8)) for n in (8, 60, 250)]
    large = [np.asarray(layer.resize((2000, 1500), Image.Resampling.BICUBIC), dtype=np.float32) for layer in layers]
    buffer = io.BytesIO()
    Image.fromarray((0.5 * large[0] + 0.3 * large[1] + 0.2 * large[2]).astype(np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


if __name__ == "__main__":
    main()
