"""Do a tokenizer's codes say more to a diffusion decoder than to the plain one?

Trains ``tokenizer_diffusion_demo`` (a small tokenizer, then a diffusion decoder beside it) and scores both decoders on held-out pictures at
the same codes: PSNR, SSIM, and two scores of features of a small classifier of the same pictures: the Fréchet distance (as rFID is one of
Inception's features) and the distance of each picture's features (as LPIPS is one of VGG's).

    python benchmarks/tokenizer_diffusion_demo.py                        # one CPU core, some minutes
    python benchmarks/tokenizer_diffusion_demo.py --score-only           # of a run that is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.recipe import load_recipe
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer, feature_distance
from mllm.visual_tokenizers.images import load_images, to_pixels
from mllm.visual_tokenizers.recipe import SupervisedTeacherSpec, TeacherSpec, stage_images
from mllm.visual_tokenizers.teacher import build_teacher

RECIPE = "tokenizer_diffusion_demo"
WAYS = {
    "diffusion, 1 step": {"steps": 1},
    "diffusion, 4 steps": {"steps": 4},
    "diffusion, 20 steps": {"steps": 20},
    "diffusion, 20 steps, guidance 2": {"steps": 20, "guidance": 2.0},
}
TEACHER = TeacherSpec(supervised=SupervisedTeacherSpec(width=48, depth=2, heads=4, patch_size=4, steps=400, lr=2e-3))


def scores(folder: Path, limit: int | None) -> dict[str, Any]:
    """The plain decoder's scores, and under ``decoders`` those of diffusion by steps and guidance."""
    tokenizer = VisualTokenizer.from_pretrained(folder)
    spec = stage_images(load_recipe(RECIPE).stages[-1])
    images, held_out = (load_images(spec, tokenizer.image.height, split) for split in ("train", "held_out"))
    teacher = build_teacher(TEACHER, tokenizer, images, seed=0, directory=folder.parent)
    decoder = tokenizer.diffusion
    decoders = {name: partial(decoder.decode, **settings) for name, settings in WAYS.items()}
    picks = list(range(0, len(held_out), max(1, len(held_out) // 8)))[:8]
    grid = comparison_grid(tokenizer, to_pixels(held_out.batch(picks)), decoders=decoders)
    grid.save(folder.parent / "comparison.png")
    return evaluate_tokenizer(
        tokenizer,
        held_out,
        limit=limit,
        features=lambda pixels: teacher(pixels)["pooled"],
        distances={"feature_distance": feature_distance(lambda pixels: teacher(pixels)["tokens"])},
        decoders=decoders,
    )


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{'decoder':34}{'PSNR':>8}{'SSIM':>8}{'Fréchet':>10}{'features':>10}"]
    for name, row in {"plain": result, **result["decoders"]}.items():
        lines.append(
            f"{name:34}{row['psnr']:>8.2f}{row['ssim']:>8.3f}{row['frechet_distance']:>10.3f}{row['feature_distance']:>10.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=f"runs/{RECIPE}")
    parser.add_argument("--score-only", action="store_true", help="train nothing")
    parser.add_argument("--limit", type=int, help="score only the first held-out pictures")
    parser.add_argument("overrides", nargs="*", help="changes of the recipe, key.sub=value")
    arguments = parser.parse_args()
    output, begun = Path(arguments.output), time.process_time()
    if not arguments.score_only:
        run_recipe(load_recipe(RECIPE, [f"output={output}", *arguments.overrides]))
        print(f"trained in {time.process_time() - begun:.0f} seconds of CPU time", flush=True)
    result = scores(output / "final", arguments.limit)
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['images']} held-out pictures of {result['bits_per_image']:.0f} bits\n\n{table(result)}")


if __name__ == "__main__":
    main()
