"""What does an encoder see a second at the pictures' own aspect, beside the same encoder on padded tiles? One GPU, no downloads.

    python benchmarks/views_speed.py --output benchmarks/results/views_speed_h200.txt
    python benchmarks/views_speed.py --small       # a tiny encoder on a CPU, to try the script; its figures say nothing

SigLIP-so400m's sizes (patches of 16, random weights made on the device), bf16, pictures of a mix of sizes as they occur together:
charts, pages, photographs upright and lying, screens, strips. ``native``: packed, each picture at its own aspect, at most --patches
patches. ``llava_next``: 384-pixel tiles on a padded canvas and a thumbnail; ``internvl``: tiles of the nearest aspect and a thumbnail.
A token is useful when it shows picture rather than padding; thumbnails show again what tiles show and are counted by themselves.
First the packed features are compared with those of every picture alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = [  # width, height
    (800, 600), (640, 480), (1024, 768), (1240, 1754), (850, 1100), (1700, 2200), (480, 640), (1080, 1920),
    (1920, 1080), (2560, 1440), (1200, 400), (400, 1600), (500, 500), (1600, 900), (768, 1024), (2000, 300),
]  # fmt: skip
TILE, PATCH = 384, 16
_SHAPE = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def parts(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name → encoder and views of a model."""
    shape = _SMALL if options.small else _SHAPE
    tiled = {
        "type": "hf",
        "architecture": {"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": PATCH, **shape},
    }
    free = {
        "type": "hf",
        "architecture": {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": PATCH, **shape},
    }
    grids = [[rows, cols] for rows in range(1, 5) for cols in range(1, 5) if 1 < rows * cols <= options.tiles]
    return {
        "native": {"encoder": free, "views": {"type": "native", "max_patches": options.patches}},
        "llava_next": {"encoder": tiled, "views": {"type": "tiles", "grids": grids}},
        "internvl": {"encoder": tiled, "views": {"type": "tiles", "dialect": "internvl", "max_tiles": options.tiles}},
    }


def build(part: dict[str, Any], folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from mllm.models.build import build_model
    from tests.helpers import tiny_spec, tiny_tokenizer

    tiny_tokenizer().save_pretrained(str(folder))
    spec = tiny_spec(str(folder), encoders={"eye": part["encoder"]}, connector={"type": "linear"}, views=part["views"])
    model, processor = build_model(spec, dtype=dtype, device=device)
    return model.eval().requires_grad_(False), processor


def useful(layouts: list[Any]) -> tuple[int, int]:
    """Tokens that show picture in detail, and those of thumbnails. A tile that reaches beyond the picture shows padding there."""
    if layouts[0].patches is not None:
        return sum(math.prod(layout.patches) for layout in layouts), 0
    each = (TILE // PATCH) ** 2
    detail = 0.0
    for layout in layouts:
        for top, left, bottom, right in layout.corners or ((0.0, 0.0, 1.0, 1.0),):
            shown = (min(bottom, 1.0) - max(top, 0.0)) * (min(right, 1.0) - max(left, 0.0))
            detail += each * shown / ((bottom - top) * (right - left))
    return round(detail), each * sum(layout.thumbnail is not None and bool(layout.corners) for layout in layouts)


def measure(name: str, part: dict[str, Any], options: argparse.Namespace) -> str:
    from mllm.processing.chat import encode_pixels
    from mllm.processing.layout import IMAGE_SIZES

    device = torch.device(options.device)
    dtype = torch.float32 if options.small else torch.bfloat16
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build(part, Path(folder), device, dtype)
        data = encode_pixels(processor, pictures, where="mix")
        alone = [encode_pixels(processor, [picture], where="one") for picture in pictures] if name == "native" else []
    tower, keys = model.model.vision_tower, model.model.pixel_keys

    def laid(found: Any) -> Any:
        return model.model.visual_layouts(found[1][IMAGE_SIZES])

    def run(found: Any) -> Any:
        pixels = {k: v.to(device, dtype) for k, v in keys.by_encoder(found[0]).items()}
        return tower(pixels, layouts=laid(found))[0]["eye"]

    layouts = laid(data)
    pixels = {k: v.to(device, dtype) for k, v in keys.by_encoder(data[0]).items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    with torch.inference_mode():
        off = ""
        if alone:
            whole = run(data).tokens[0].float()
            apart = torch.cat([run(found).tokens[0] for found in alone]).float()
            off = f" · packed against alone: {float((whole - apart).norm() / apart.norm()):.1e}"
        for number in range(options.repeats + 3):
            wait()
            began = time.perf_counter()
            features = tower(pixels, layouts=layouts)[0]["eye"]
            wait()
            if number >= 3:
                times.append(time.perf_counter() - began)
    seconds = sorted(times)[len(times) // 2]
    tokens = features.tokens.shape[0] * features.tokens.shape[1]
    detail, small = useful(layouts)
    memory = f" · {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return (
        f"{name:<11} {len(SIZES) / seconds:8.1f} pictures/s {tokens / seconds:10.0f} tokens/s, in detail and useful "
        f"{detail / seconds:10.0f} ({detail} of {tokens}, thumbnails {small}){memory}{off}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--patches", type=int, default=2304, help="Most patches of a picture, native (four tiles' worth)."
    )
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    kind = "fp32, tiny" if options.small else "bf16"
    lines = [
        f"{date.today()} · views_speed.py · {where} · torch {torch.__version__} · {len(SIZES)} pictures a batch, {kind}"
    ]
    print(lines[0], flush=True)
    for name, part in parts(options).items():
        lines.append(measure(name, part, options))
        print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
