"""Do dual codebooks say more about an image than one codebook of the same total size, at no worse pixels?

Trains a small teacher and the three ``tokenizer_demo_*`` recipes on real digits and rendered charts, then compares
them on held-out images: PSNR, SSIM, bits, code usage, and a linear probe on the quantised features.

    python benchmarks/tokenizer_demo.py --output runs/tokenizer_demo
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.evaluate import evaluate_tokenizer, linear_probe, probe_tokenizer
from mllm.visual_tokenizers.images import DigitsAndChartsOptions, ImageSource, load_images, to_pixels
from mllm.visual_tokenizers.recipe import ImagesSpec, SupervisedTeacherSpec, load_tokenizer_recipe
from mllm.visual_tokenizers.teacher import EncoderTeacher, train_classifier
from mllm.visual_tokenizers.train import train_tokenizer

RECIPES = ("tokenizer_demo_single", "tokenizer_demo_single_semantic", "tokenizer_demo_dual")


def train_teacher(path: Path, images: ImageSource, held_out: ImageSource, steps: int) -> float:
    """Train the teacher of the recipes on the images' classes, save it, and return its held-out accuracy."""
    settings = load_tokenizer_recipe("tokenizer_demo_dual").tokenizer["semantic_encoder"]
    settings = {**settings, "weights": None}
    teacher = EncoderTeacher(settings)
    sizes = {key: settings[key] for key in ("width", "depth", "heads", "patch_size")}
    layer = train_classifier(
        teacher, images, SupervisedTeacherSpec(steps=steps, batch_size=48, rate=2e-3, **sizes), seed=0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in teacher.encoder.encoder.state_dict().items()}, str(path))
    assert held_out.labels is not None
    with torch.no_grad():
        pixels = to_pixels(held_out.batch(range(len(held_out))))
        return float((layer(teacher(pixels)["pooled"]).argmax(1) == held_out.labels).float().mean())


def pixel_probe(images: ImageSource, held_out: ImageSource) -> float:
    """Linear probe on 8 × 8 block means of the raw pixels, for scale."""
    assert images.labels is not None and held_out.labels is not None
    reduce = lambda x: torch.nn.functional.avg_pool2d(to_pixels(x), x.shape[-1] // 8).flatten(1)  # noqa: E731
    a, b = (reduce(source.batch(range(len(source)))) for source in (images, held_out))
    return linear_probe(a, images.labels, b, held_out.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/tokenizer_demo")
    parser.add_argument("--steps", type=int, help="training steps of each recipe instead of its own")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    output = Path(arguments.output)
    start = time.perf_counter()
    options = DigitsAndChartsOptions(charts=600).model_dump()
    spec = ImagesSpec(type="digits_and_charts", options=options)
    images, held_out = (load_images(spec, 64, split) for split in ("train", "held_out"))
    teacher = output / "teacher.safetensors"
    report = {
        "train_images": len(images),
        "held_out_images": len(held_out),
        "teacher_accuracy": train_teacher(teacher, images, held_out, arguments.teacher_steps),
        "teacher_seconds": round(time.perf_counter() - start, 1),
        "raw_pixel_blocks_probe": pixel_probe(images, held_out),
        "tokenizers": {},
    }
    print(json.dumps(report), flush=True)
    for name in arguments.recipes:
        begun = time.perf_counter()
        recipe = load_tokenizer_recipe(name)
        overrides = [f"output={output / name}"]
        if recipe.tokenizer["type"] == "illume":
            overrides.append(f"tokenizer.semantic_encoder.weights={teacher}")
        if recipe.teacher is not None:
            overrides.append(f"teacher.encoder.weights={teacher}")
        if arguments.steps:
            overrides.append(f"steps={arguments.steps}")
        train_tokenizer(name, overrides)
        tokenizer = VisualTokenizer.from_pretrained(output / name / "final")
        row = evaluate_tokenizer(tokenizer, held_out)
        row["codebook_entries"] = sum(size for size, _ in tokenizer.codebooks.values())
        row["probe_mean"] = probe_tokenizer(tokenizer, images, held_out)
        row["probe_positions"] = probe_tokenizer(tokenizer, images, held_out, pool=False)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        report["tokenizers"][name] = row
        print(json.dumps({name: row}), flush=True)
    report["seconds"] = round(time.perf_counter() - start, 1)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))


def table(report: dict) -> str:
    """The comparison as text."""
    lines = [
        f"{'tokenizer':34}{'entries':>8}{'bits':>7}{'1/raw':>7}{'PSNR':>7}{'SSIM':>7}{'usage':>18}{'probe':>7}{'probe*':>8}"
    ]
    for name, row in report["tokenizers"].items():
        usage = " ".join(f"{value['used']:.0%}" for value in row["usage"].values())
        lines.append(
            f"{name:34}{row['codebook_entries']:>8}{row['bits_per_image']:>7.0f}{row['compression']:>7.0f}{row['psnr']:>7.2f}"
            f"{row['ssim']:>7.3f}{usage:>18}{row['probe_mean']['all']:>7.1%}{row['probe_positions']['all']:>8.1%}"
        )
    lines.append("probe: mean of the quantised features over positions; probe*: all positions side by side")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
