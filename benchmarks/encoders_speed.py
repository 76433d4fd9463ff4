"""How many images a second does every research backbone see, beside other people's module of the same name where one can be installed?

    python benchmarks/encoders_speed.py --output benchmarks/results/encoders_speed_h200    # a GPU: batch 32, bf16, all backbones
    python benchmarks/encoders_speed.py --device cpu --batch 1 --dtype float32 --names biformer-t,crossvit-9-dagger-240

Weights are random and built on the device, images are noise: times depend on neither. Every family is a section: a process of its own
with a time limit (--limit), and none starts once --seconds are over; what was not reached is told in the table. Beside ours stand
timm's CrossViT of the same architecture, timm's models by name alone, and vit-pytorch's LookupViT where that package is installed;
the authors' repositories are no packages. Ours is timed eager, and with compiled blocks where --compile is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

OURS = "ours"
_TIMM = {  # of the catalogue's entries: the same architecture in timm
    "crossvit-9-dagger-240": "crossvit_9_dagger_240",
    "crossvit-15-dagger-408": "crossvit_15_dagger_408",
    "crossvit-18-dagger-408": "crossvit_18_dagger_408",
    "crossvit-base-240": "crossvit_base_240",
}
_BESIDE = {"davit-b": "davit_base", "swin-b-384": "swin_base_patch4_window12_384", "hiera-b-mae": "hiera_base_224"}
"""Entries that timm computes itself: our adapter beside the bare model, so that the adapter's cost is seen."""
_VIT_PYTORCH = {"lookupvit-b-5x5": "look_vit"}


def names_of_catalogue() -> list[str]:
    from mllm.config import read_yaml

    file = Path(__file__).parents[1] / "mllm" / "encoders" / "backbones" / "catalogue.yaml"
    return [*read_yaml(file), *_BESIDE]


def other_modules(name: str) -> list[str]:
    found = ["timm"] if name in _TIMM or name in _BESIDE else []
    if name in _VIT_PYTORCH and importlib.util.find_spec("vit_pytorch") is not None:
        found.append("vit_pytorch")
    return found


def build(
    name: str, who: str, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], Any], Any, tuple[int, int]]:
    """A module on the device, what it does with pixels, and the pixels' size."""
    from mllm.encoders.catalogue import build_encoder, encoder_config

    config = encoder_config({"preset": name, "weights": None}, where=name)
    image = config.info.image
    size = (image.height, image.width)
    torch.manual_seed(0)
    with torch.device(device):
        if who == OURS:
            module: Any = build_encoder(config)
        elif who == "timm":
            import timm

            options = {} if name in _TIMM else {"num_classes": 0}
            if name in _BESIDE and name != "davit-b":
                size = tuple(timm.models.get_pretrained_cfg(_BESIDE[name]).input_size[1:])
            module = timm.create_model({**_TIMM, **_BESIDE}[name], pretrained=False, **options)
        else:
            from vit_pytorch.look_vit import LookViT

            sizes = {
                "dim": 768,
                "depth": 12,
                "heads": 12,
                "dim_head": 64,
                "cross_attn_heads": 12,
                "cross_attn_dim_head": 64,
            }
            grid = {
                "patch_size": size[0] // 5,
                "highres_patch_size": 16,
                "patch_conv_kernel_size": 1,
                "image_size": size[0],
            }
            module = LookViT(**sizes, **grid, mlp_factor=4, highres_mlp_factor=0.5, num_classes=1)
    module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if who == OURS:
        module.restore_buffers()
        return lambda pixels: module(pixels).tokens, module, size
    return getattr(module, "forward_features", module), module, size


def measure(name: str, who: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second by the median batch."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    run, module, size = build(name, who, device, dtype)
    if options.compile and who == OURS:
        from mllm.models.compilation import repeated_layers

        for layer in repeated_layers(module):
            layer.compile()
    pixels = torch.randn(options.batch, 3, *size, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    with torch.inference_mode():
        for number in range(options.warm + options.repeats):
            wait()
            start = time.perf_counter()
            run(pixels)
            wait()
            if number >= options.warm:
                times.append(time.perf_counter() - start)
    seconds = sorted(times)[len(times) // 2]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"images_per_second": options.batch / seconds, "batches": len(times), "gib": memory, "size": list(size)}


def run_section(jobs: list[tuple[str, str]], options: argparse.Namespace) -> None:
    """Measure one after the other in this process, a line of JSON each; one that fails does not end the others."""
    for name, who in jobs:
        try:
            found = measure(name, who, options)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        print(json.dumps({"name": name, "who": who, **found}), flush=True)


def section(jobs: list[tuple[str, str]], options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """`run_section` in a process of its own; what it had told when its time was up counts."""
    command = [
        sys.executable, __file__, "--section", json.dumps(jobs), "--device", options.device, "--batch", str(options.batch),
        "--dtype", options.dtype, "--warm", str(options.warm), "--repeats", str(options.repeats),
    ]  # fmt: skip
    command += ["--compile"] if options.compile else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        text, reason = done.stdout, (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    except subprocess.TimeoutExpired as stopped:
        told = stopped.stdout or b""
        text = told.decode() if isinstance(told, bytes) else told
        reason = f"the section was longer than {seconds:.0f} s"
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    reached = {(entry["name"], entry["who"]) for entry in found}
    return found + [{"name": n, "who": w, "error": reason} for n, w in jobs if (n, w) not in reached]


def families(names: list[str]) -> list[list[tuple[str, str]]]:
    """Jobs of one section each, by the catalogue's types; those with a rival first, whose ratio is the figure that is asked for."""
    from mllm.encoders.catalogue import catalogue

    entries = catalogue()
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        grouped.setdefault(entries[name]["type"], []).extend((name, who) for who in (OURS, *other_modules(name)))
    return sorted(grouped.values(), key=lambda jobs: all(who == OURS for _, who in jobs))


def table(found: list[dict[str, Any]]) -> list[str]:
    rows = [("encoder", "size", "images/s", "GiB", "beside", "images/s", "ratio")]
    for own in (entry for entry in found if entry["who"] == OURS):
        others = [entry for entry in found if entry["name"] == own["name"] and entry["who"] != OURS] or [None]
        for other in others:
            speed, rival = own.get("images_per_second"), (other or {}).get("images_per_second")
            rows.append(
                (
                    own["name"],
                    "x".join(map(str, own.get("size", []))) or own["error"],
                    f"{speed:.1f}" if speed else "-",
                    f"{own['gib']:.1f}" if speed else "-",
                    (other or {}).get("who", ""),
                    f"{rival:.1f}" if rival else (other or {}).get("error", ""),
                    f"{speed / rival:.2f}" if speed and rival else "",
                )
            )
    sizes = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, sizes)).rstrip() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=float, default=40, help="Seconds of one section.")
    parser.add_argument(
        "--seconds", type=float, default=230, help="No section starts after so many; the last ends by then."
    )
    parser.add_argument("--compile", action="store_true", help="Compile our repeated blocks.")
    parser.add_argument("--names", default="", help="Comma separated; default: the whole catalogue of backbones.")
    parser.add_argument("--output", type=Path, help="Write NAME.json and NAME.txt.")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        run_section([tuple(job) for job in json.loads(options.section)], options)
        return
    began = time.monotonic()
    names = [name for name in options.names.split(",") if name] or names_of_catalogue()
    found: list[dict[str, Any]] = []
    for jobs in families(names):
        left = options.seconds - (time.monotonic() - began)
        if left < 10:
            found += [{"name": name, "who": who, "error": "the time was up"} for name, who in jobs]
            continue
        found += section(jobs, options, min(options.limit, left))
        print(f"{time.monotonic() - began:5.0f} s  {jobs[0][0]} …", flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    head = (
        f"{date.today()} · python benchmarks/encoders_speed.py --batch {options.batch} --dtype {options.dtype}"
        f"{' --compile' if options.compile else ''} · {device}, torch {torch.__version__}"
    )
    lines = [head, *table(found), f"total {time.monotonic() - began:.0f} s"]
    print("\n".join(lines))
    if options.output:
        options.output.with_suffix(".json").write_text(
            json.dumps({"run": head, "sections": found}, indent=1) + "\n", encoding="utf-8"
        )
        options.output.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
