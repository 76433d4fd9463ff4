"""Do dual codebooks say more about an image than one codebook of the same total size, at no worse pixels?

Trains a small teacher and the three ``tokenizer_demo_*`` recipes on real digits and rendered charts, then compares
them on held-out images: PSNR, SSIM, bits, code usage, and a linear probe on the quantised features.

    python benchmarks/tokenizer_demo.py --output runs/tokenizer_demo                     # one CPU core, about 12 minutes
    python benchmarks/tokenizer_demo.py --device cuda --processes 3                      # one GPU, about a minute
    python benchmarks/tokenizer_demo.py --larger --processes 3 --output runs/tokenizer_larger     # one H200, about 200 s

``--larger``: 128-pixel coloured digits and 6000 charts, books of 4096 codes and more, networks of twice the width, bf16.
There the number of steps is what ``--seconds`` allows, measured at the start and the same for all tokenizers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from processes import choose_device, run_jobs
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.distributed import local_device
from mllm.train.observe.tracking import read_metrics
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.evaluate import evaluate_tokenizer, linear_probe, probe_tokenizer
from mllm.visual_tokenizers.images import ImageSource, load_images, to_pixels
from mllm.visual_tokenizers.recipe import SupervisedTeacherSpec, TokenizerTraining, load_training
from mllm.visual_tokenizers.teacher import EncoderTeacher, train_classifier

RECIPES = ("tokenizer_demo_single", "tokenizer_demo_single_semantic", "tokenizer_demo_dual")
_CONVOLUTION = "{channels: 16, multipliers: [1, 2, 4, 8], num_res_blocks: 1, groups: 8}"
_BOOK = "codebook: {learn: ema, decay: 0.98, restart: true, restart_below: 0.1}"
_TEACHER = "{type: small_vit, image_size: 128, patch_size: 16, width: 96, depth: 3, heads: 4}"
_ANY = [
    "model.visual_tokenizer.image_size=128",
    "model.visual_tokenizer.z_channels=128",
    "stages.tokenizer.data.options={charts: 6000, colour: true}",
    "stages.tokenizer.options.kmeans=512",
    "stages.tokenizer.batch_size=64",
    "stages.tokenizer.steps=3000",
    "stages.tokenizer.schedule.warmup=100",
    "stages.tokenizer.optimizer.ema=0.99",
    "stages.tokenizer.dtype=bfloat16",
]
_SINGLE = [
    *_ANY,
    f"model.visual_tokenizer.encoder={_CONVOLUTION}",
    f"model.visual_tokenizer.quantizer={{type: vq, size: 4608, parts: {{pixel: 16}}, beta: 0.25, {_BOOK}}}",
]
LARGER = {
    "tokenizer_demo_single": _SINGLE,
    "tokenizer_demo_single_semantic": [
        *_SINGLE,
        "model.visual_tokenizer.semantic_head={teacher_dim: 96, width: 128, depth: 1, heads: 4}",
        f"stages.tokenizer.options.teacher.encoder={_TEACHER}",
    ],
    "tokenizer_demo_dual": [
        *_ANY,
        f"model.visual_tokenizer.semantic_encoder={_TEACHER}",
        "model.visual_tokenizer.semantic_width=96",
        f"model.visual_tokenizer.semantic_quantizer={{type: vq, size: 512, parts: {{semantic: 16}}, {_BOOK}}}",
        f"model.visual_tokenizer.pixel_encoder={_CONVOLUTION}",
        f"model.visual_tokenizer.decoder={_CONVOLUTION}",
        f"model.visual_tokenizer.pixel_quantizer={{type: vq, size: 4096, parts: {{pixel: 16}}, beta: 0.25, {_BOOK}}}",
    ],
}
"""Changes of each recipe: 256 positions with one code, beside 64 semantic codes where there are two books; 4608 entries."""


def demo_recipe(
    name: str, output: Path, *, larger: bool = False, overrides: list[str] | None = None
) -> TokenizerTraining:
    """A demo recipe that reads the teacher in ``output`` and writes into ``output/<name>``."""
    return load_training(name, demo_overrides(name, output, larger=larger) + (overrides or []))


def demo_overrides(name: str, output: Path, *, larger: bool = False) -> list[str]:
    """The overrides that make `demo_recipe` of a shipped recipe."""
    chosen = [*(LARGER[name] if larger else []), f"output={output / name}"]
    recipe = load_training(name)
    weights = output / "stages.tokenizer.options.teacher.safetensors"
    if recipe.tokenizer["type"] == "illume":
        chosen.append(f"model.visual_tokenizer.semantic_encoder.weights={weights}")
    if recipe.teacher is not None:
        chosen.append(f"stages.tokenizer.options.teacher.encoder.weights={weights}")
    return chosen


def train_teacher(
    path: Path, recipe: TokenizerTraining, images: ImageSource, held_out: ImageSource, steps: int, device: str = "cpu"
) -> float:
    """Train the teacher of a dual recipe on the images' classes, save it, and return its held-out accuracy."""
    settings = {**recipe.tokenizer["semantic_encoder"], "weights": None}
    teacher = EncoderTeacher(settings).to(device)
    sizes = {key: settings[key] for key in ("width", "depth", "heads", "patch_size")}
    spec = SupervisedTeacherSpec(steps=steps, batch_size=48, lr=2e-3, **sizes)
    layer = train_classifier(teacher, images, spec, seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = teacher.encoder.encoder.state_dict()
    save_file({key: value.cpu().contiguous() for key, value in weights.items()}, str(path))
    assert held_out.labels is not None
    right = 0
    with torch.no_grad():
        for part in torch.arange(len(held_out)).split(512):
            logits = layer(teacher(to_pixels(held_out.batch(part.tolist()), device))["pooled"])
            right += int((logits.argmax(1).cpu() == held_out.labels[part]).sum())
    return right / len(held_out)


def pixel_probe(images: ImageSource, held_out: ImageSource, device: str = "cpu") -> float:
    """Linear probe on 8 × 8 block means of the raw pixels, for scale."""
    assert images.labels is not None and held_out.labels is not None
    found = []
    for source in (images, held_out):
        parts = [to_pixels(source.batch(p.tolist()), device) for p in torch.arange(len(source)).split(512)]
        found.append(torch.cat([torch.nn.functional.avg_pool2d(x, x.shape[-1] // 8).flatten(1) for x in parts]))
    return linear_probe(found[0], images.labels.to(device), found[1], held_out.labels.to(device))


def measured_steps(recipe: TokenizerTraining, seconds: float) -> int:
    """As many of the recipe's steps as fit in ``seconds``, by the median time of its first 25."""
    with tempfile.TemporaryDirectory() as folder:
        short = recipe.recipe.model_copy(deep=True)
        short.stages[0].log_every = 1
        run_recipe(short, output=folder, stop_after=25)
        each = statistics.median(record["seconds"] for record in read_metrics(Path(folder)))
    return max(1, min(recipe.stage.steps or 1, int(seconds / each)))


def train_and_score(job: tuple[str, list[str], bool]) -> dict[str, Any]:
    """One tokenizer: trained, saved, and its scores on the held-out images. job: recipe, overrides, whether to probe all
    positions side by side too."""
    name, overrides, positions = job
    begun = time.perf_counter()
    recipe = load_training(name, overrides)
    run_recipe(recipe.recipe)
    trained = time.perf_counter()
    tokenizer = VisualTokenizer.from_pretrained(recipe.recipe.output_dir / "final").to(local_device())
    images, held_out = (load_images(recipe.images, tokenizer.image.height, split) for split in ("train", "held_out"))
    row = evaluate_tokenizer(tokenizer, held_out)
    row["codebook_entries"] = sum(size for size, _ in tokenizer.codebooks.values())
    row["probe_mean"] = probe_tokenizer(tokenizer, images, held_out)
    if positions:
        row["probe_positions"] = probe_tokenizer(tokenizer, images, held_out, pool=False)
    row["steps"] = recipe.stage.steps
    row["training_seconds"] = round(trained - begun, 1)
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return {name: row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/tokenizer_demo")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--larger", action="store_true", help="the proof that is sized for one H200")
    parser.add_argument("--processes", type=int, default=1, help="tokenizers that are trained side by side")
    parser.add_argument("--seconds", type=float, default=120, help="with --larger: training time of all tokenizers")
    parser.add_argument("--steps", type=int, help="training steps of each recipe instead of its own")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("overrides", nargs="*", help="changes of every recipe, key.sub=value")
    arguments = parser.parse_args()
    device, output = choose_device(arguments.device), Path(arguments.output)
    start = time.perf_counter()
    dual = demo_recipe("tokenizer_demo_dual", output, larger=arguments.larger, overrides=arguments.overrides)
    size = dual.tokenizer["image_size"]
    images, held_out = (load_images(dual.images, size, split) for split in ("train", "held_out"))
    teacher = output / "stages.tokenizer.options.teacher.safetensors"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "train_images": len(images),
        "held_out_images": len(held_out),
        "image_size": size,
        "teacher_accuracy": train_teacher(teacher, dual, images, held_out, arguments.teacher_steps, device),
        "teacher_seconds": round(time.perf_counter() - start, 1),
        "raw_pixel_blocks_probe": pixel_probe(images, held_out, device),
    }
    print(json.dumps(report), flush=True)
    steps = arguments.steps
    if arguments.larger and steps is None:
        steps = measured_steps(dual, arguments.seconds / len(arguments.recipes))
    changes = [*arguments.overrides, *([f"stages.tokenizer.steps={steps}"] if steps else [])]
    # Of the larger pictures all positions make features of thousands of channels, which a CPU would probe for minutes.
    positions = device == "cuda" or not arguments.larger
    jobs = [(n, demo_overrides(n, output, larger=arguments.larger) + changes, positions) for n in arguments.recipes]
    if arguments.processes > 1:
        rows = run_jobs(train_and_score, jobs, processes=arguments.processes)
    else:
        rows = []
        for job in jobs:
            rows.append(train_and_score(job))
            print(json.dumps(rows[-1]), flush=True)
    found = {name: row for each in rows if "error" not in each for name, row in each.items()}
    report["tokenizers"] = {name: found[name] for name in arguments.recipes if name in found}
    report["seconds"] = round(time.perf_counter() - start, 1)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    if any("error" in row for row in rows):
        raise SystemExit(1)


def table(report: dict) -> str:
    """The comparison as text."""
    lines = [
        f"{'tokenizer':34}{'entries':>8}{'bits':>7}{'1/raw':>7}{'PSNR':>7}{'SSIM':>7}{'usage':>18}{'probe':>7}{'probe*':>8}"
    ]
    for name, row in report["tokenizers"].items():
        usage = " ".join(f"{value['used']:.0%}" for value in row["usage"].values())
        side_by_side = f"{row['probe_positions']['all']:.1%}" if "probe_positions" in row else "-"
        lines.append(
            f"{name:34}{row['codebook_entries']:>8}{row['bits_per_image']:>7.0f}{row['compression']:>7.0f}{row['psnr']:>7.2f}"
            f"{row['ssim']:>7.3f}{usage:>18}{row['probe_mean']['all']:>7.1%}{side_by_side:>8}"
        )
    lines.append("probe: mean of the quantised features over positions; probe*: all positions side by side")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
