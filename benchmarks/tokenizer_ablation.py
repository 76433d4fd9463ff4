"""Why do the dual demo tokenizer's pixels come out below those of a pixels-only codebook of the same total size?

Trains variants of ``recipes/tokenizer_demo_{single,dual}.yaml`` that each take one suspected cause away, with several seeds and
one shared teacher, prints one JSON line per run, then a table of mean and spread over seeds.

    python benchmarks/tokenizer_ablation.py --device cuda --processes 8 --limit 280 --output runs/tokenizer_ablation    # one H200
    python benchmarks/tokenizer_ablation.py --device cpu --variants single dual --seeds 0 1                            # slower
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from processes import choose_device, run_jobs
from tokenizer_demo import demo_recipe, train_teacher
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mllm.train.stages.tokenizer.stage as stage
from mllm.distributed import local_device
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.base import VisualTokenizer, as_unit_range
from mllm.visual_tokenizers.evaluate import evaluate_tokenizer, probe_tokenizer, psnr
from mllm.visual_tokenizers.images import ImageSource, load_images, to_pixels

SINGLE, DUAL = "tokenizer_demo_single", "tokenizer_demo_dual"
_PIXEL, _SEMANTIC, _ONE = (f"model.visual_tokenizer.{name}quantizer" for name in ("pixel_", "semantic_", ""))


def _zero(semantic: Tensor) -> Tensor:
    return torch.zeros_like(semantic)


def _unit(semantic: Tensor) -> Tensor:
    return semantic / semantic.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class Variant(NamedTuple):
    """A recipe, its changes, and what the pixel decoder gets of the semantic vectors (None: as they are)."""

    recipe: str
    overrides: tuple[str, ...] = ()
    decoder_gets: Callable[[Tensor], Tensor] | None = None


VARIANTS: dict[str, Variant] = {
    "single": Variant(SINGLE),
    "dual": Variant(DUAL),
    # The pixel book is smaller than the single one: 896 of 1024.
    "single_896": Variant(SINGLE, (f"{_ONE}.size=896",)),
    "dual_pixel_1024": Variant(DUAL, (f"{_PIXEL}.size=1024",)),
    # The semantic loss and the pixels pull at the same vectors.
    "dual_semantic_weight_0": Variant(DUAL, ("stages.tokenizer.options.losses.weights.semantic=0.0",)),
    "dual_detached": Variant(DUAL, (), Tensor.detach),
    # The semantic vectors disturb the decoder: hard, coarse, of another scale, moving while it learns.
    "dual_without_semantic_input": Variant(DUAL, (), _zero),
    "dual_unit_semantic_input": Variant(DUAL, (), _unit),
    "dual_detached_unit": Variant(DUAL, (), lambda x: _unit(x.detach())),
    # Nothing semantic at all: what is left is the pixel path by itself, which should equal single_896.
    "dual_pixels_alone": Variant(DUAL, ("stages.tokenizer.options.losses.weights.semantic=0.0",), _zero),
    # One gradient norm is clipped for both paths.
    "single_unclipped": Variant(SINGLE, ("stages.tokenizer.optimizer.max_grad_norm=null",)),
    "dual_unclipped": Variant(DUAL, ("stages.tokenizer.optimizer.max_grad_norm=null",)),
    # Codebooks: start and restart.
    "single_no_kmeans": Variant(SINGLE, ("stages.tokenizer.options.kmeans=0",)),
    "dual_no_kmeans": Variant(DUAL, ("stages.tokenizer.options.kmeans=0",)),
    "single_no_restart": Variant(SINGLE, (f"{_ONE}.codebook.restart=false",)),
    "dual_no_restart": Variant(
        DUAL, (f"{_PIXEL}.codebook.restart=false", f"{_SEMANTIC}.codebook.restart=false")
    ),
    # Undertrained: the dual tokenizer has more to learn in the same steps.
    "single_1200": Variant(SINGLE, ("stages.tokenizer.steps=1200",)),
    "dual_1200": Variant(DUAL, ("stages.tokenizer.steps=1200",)),
    "single_2400": Variant(SINGLE, ("stages.tokenizer.steps=2400",)),
    "dual_2400": Variant(DUAL, ("stages.tokenizer.steps=2400",)),
}  # fmt: skip


class Job(NamedTuple):
    variant: str
    seed: int
    output: str
    device: str
    steps: int | None


def run_variant(job: Job) -> dict[str, Any]:
    """Train one variant with one seed and score it on the held-out images."""
    variant, begun = VARIANTS[job.variant], time.perf_counter()
    changes = [*variant.overrides, f"seed={job.seed}", *([f"stages.tokenizer.steps={job.steps}"] if job.steps else [])]
    output = Path(job.output)
    recipe = demo_recipe(variant.recipe, output, overrides=changes)
    with _changed_decoder_input(variant.decoder_gets):
        final = run_recipe(recipe.recipe, output=output / f"{job.variant}-{job.seed}")
        tokenizer = VisualTokenizer.from_pretrained(final).to(local_device())
        if variant.decoder_gets is not None:
            _change_decoder_input(tokenizer, variant.decoder_gets)
        images, held_out = (load_images(recipe.images, tokenizer.image.height, s) for s in ("train", "held_out"))
        scores = evaluate_tokenizer(tokenizer, held_out)
        probe = probe_tokenizer(tokenizer, images, held_out)
        return {
            "variant": job.variant,
            "seed": job.seed,
            "steps": recipe.stage.steps,
            "psnr": scores["psnr"],
            "ssim": scores["ssim"],
            **psnr_by_part(tokenizer, held_out),
            "used": {name: value["used"] for name, value in scores["usage"].items()},
            "perplexity": {name: round(value["perplexity"], 1) for name, value in scores["usage"].items()},
            "size_of_vectors": _size_of_vectors(tokenizer, held_out),
            "probe": probe,
            "seconds": round(time.perf_counter() - begun, 1),
        }


@contextmanager
def _changed_decoder_input(change: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Within the block, tokenizers start training with the change."""
    start = stage.start_tokenizer

    def changed(*arguments: Any) -> VisualTokenizer:
        tokenizer = start(*arguments)
        if change is not None:
            _change_decoder_input(tokenizer, change)
        return tokenizer

    stage.start_tokenizer = changed
    try:
        yield
    finally:
        stage.start_tokenizer = start


def _change_decoder_input(tokenizer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """The pixel decoder of a dual tokenizer gets ``change(semantic vectors)``, in training and evaluation."""
    whole = tokenizer._pixels
    tokenizer._pixels = lambda semantic, pixel: whole(change(semantic), pixel)


@torch.no_grad()
def psnr_by_part(tokenizer: VisualTokenizer, images: ImageSource) -> dict[str, float]:
    """Mean PSNR of digits and of charts, and the PSNR of the mean squared error over all images."""
    assert images.labels is not None
    device, values = tokenizer.last_layer().device, []
    for part in torch.arange(len(images)).split(64):
        pixels = to_pixels(images.batch(part.tolist()), device)
        made = as_unit_range(tokenizer.decode(tokenizer.encode(pixels)))
        values.append(psnr((made * 255).round() / 255, as_unit_range(pixels)).cpu())
    found, charts = torch.cat(values), images.labels >= 10
    error = float((10 ** (-found / 10)).mean())
    return {
        "psnr_digits": float(found[~charts].mean()),
        "psnr_charts": float(found[charts].mean()),
        "psnr_of_mean_error": -10 * math.log10(error),
    }


@torch.no_grad()
def _size_of_vectors(tokenizer: VisualTokenizer, images: ImageSource) -> dict[str, float]:
    """Root mean square of the quantised vectors of each book, as the decoder would see them."""
    pixels = to_pixels(images.batch(range(0, len(images), 8)), tokenizer.last_layer().device)
    vectors = tokenizer.embed(tokenizer.encode(pixels))
    return {name: round(float(value.square().mean().sqrt()), 4) for name, value in vectors.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds of each variant, in the order of `VARIANTS`."""
    keys = ("psnr", "psnr_digits", "psnr_charts", "psnr_of_mean_error", "ssim")
    lines = [f"{'variant':30}{'runs':>5}" + "".join(f"{key:>19}" for key in keys) + f"{'probe':>16}{'used':>14}"]
    for name in VARIANTS:
        mine = [row for row in rows if row.get("variant") == name]
        if not mine:
            continue
        cells = "".join(f"{_spread([row[key] for row in mine], 3 if key == 'ssim' else 2):>19}" for key in keys)
        probe = _spread([100 * row["probe"]["all"] for row in mine], 1)
        used = " ".join(f"{mean(row['used'][book] for row in mine):.0%}" for book in mine[0]["used"])
        lines.append(f"{name:30}{len(mine):>5}{cells}{probe:>16}{used:>14}")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/tokenizer_ablation")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=float, help="seconds after which what is not finished is left out")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of every variant instead of its own")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    arguments = parser.parse_args()
    started, output, device = time.monotonic(), Path(arguments.output), choose_device(arguments.device)
    recipe = demo_recipe(DUAL, output)
    weights = output / "stages.tokenizer.options.teacher.safetensors"
    if not weights.is_file():
        images, held_out = (load_images(recipe.images, 64, split) for split in ("train", "held_out"))
        accuracy = train_teacher(weights, recipe, images, held_out, arguments.teacher_steps, device)
        print(json.dumps({"teacher_accuracy": accuracy, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    # Seed after seed, so that a time limit costs seeds, not variants; the longest runs of a seed first.
    jobs = [
        Job(name, seed, str(output), device, arguments.steps)
        for seed in arguments.seeds
        for name in sorted(arguments.variants, key=lambda v: -demo_recipe_steps(v))
    ]
    limit = None if arguments.limit is None else max(1.0, arguments.limit - (time.monotonic() - started))
    rows = run_jobs(run_variant, jobs, processes=arguments.processes, limit=limit)
    report = {"device": device, "rows": rows, "seconds": round(time.monotonic() - started, 1)}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"{len(rows)} of {len(jobs)} runs, {report['seconds']} s; {output / 'report.json'}")


def demo_recipe_steps(variant: str) -> int:
    """Training steps that a variant names; 0 for the recipe's own."""
    return max(
        (
            int(o.removeprefix("stages.tokenizer.steps="))
            for o in VARIANTS[variant].overrides
            if o.startswith("stages.tokenizer.steps=")
        ),
        default=0,
    )


if __name__ == "__main__":
    main()
