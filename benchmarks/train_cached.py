"""How much faster is training on stored features of frozen encoders than on live ones, by the language model's size?

`mllm train` itself, watched from outside: CLIP-L/336 and DINOv2-L/336 frozen, JPEGs, rows packed to 2 x 4096, a Llama of 0.5B and of 7B,
with the encoders live and with `cache_features: true` (0.5B: int8 too). Stored features also save decoding and resizing. Of a 7B's step the
encoders are some hundredths, so that little can be gained; of a 0.5B's they are a large part, and the share is told.

    python benchmarks/train_cached.py                                   # one GPU, about 8 minutes; also $OUT/train_cached.txt
    python benchmarks/train_cached.py --sections "0.5b, live" "0.5b, cached" "0.5b, int8"   # about 4 minutes
    python benchmarks/train_cached.py --device cpu --patience 6 --sections "tiny, live" "tiny, cached"   # checks the script
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import compiled_in, measure, watch, write_recipe

SECTIONS = {
    "tiny, live": 60.0,
    "tiny, cached": 60.0,
    "0.5b, live": 75.0,
    "0.5b, cached": 80.0,
    "0.5b, int8": 80.0,
    "7b, live": 110.0,
    "7b, cached": 120.0,
}
SKIP, STEPS = 4, 24


def run(options: argparse.Namespace, folder: Path, name: str) -> dict:
    size, way = name.split(", ")
    short = name.replace(", ", "-").replace(".", "")
    stored = {"live": False, "cached": True, "int8": "int8"}[way]
    cuda = options.device == "cuda"
    settings = {"num_workers": 6 if cuda else 0, "compile": cuda, "cache_features": stored}
    recipe = write_recipe(folder, size, name=short, steps=200, **settings)
    cache = folder / "cache" / short
    where = {**compiled_in(folder), "MLLM_CACHE": str(cache)}
    seen = watch(recipe, steps=SKIP + STEPS, limit=SECTIONS[name] * options.patience - 5, **where)
    share = seen.middle("data_wait", SKIP)
    features = [line for _, line in seen.lines if re.search(r"feature", line)]
    began, ended = seen.second_of(r"features of .* pictures as"), seen.second_of(r"newly computed")
    on_disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    shutil.rmtree(folder / short, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)
    if len(seen.steps) <= SKIP:
        return {"error": "no steps", "last lines": [line for _, line in seen.lines[-3:]]}
    total = [step["tflops"] for step in seen.steps[SKIP:] if "tflops" in step]
    language = [t["language_model"] / t["total"] for t in total if t["total"]]
    return {
        "ms a step": round(1e3 * (seen.middle("seconds", SKIP) or 0), 1),
        "tok/s": round(seen.middle("tokens_per_second", SKIP) or 0),
        "samples/s": round(seen.middle("samples_per_second", SKIP) or 0, 1),
        "encoders' share of the operations": round(1 - sorted(language)[len(language) // 2], 3) if language else None,
        "waiting for data": None if share is None else round(share, 3),
        "seconds to store features": None if began is None or ended is None else round(ended - began, 1),
        "features on disk MB": round(on_disk / 1e6, 1),
        "said of features": [line[:160] for line in features[-3:]],
        "losses of steps 1 to 3": [round(step["loss"], 4) for step in seen.steps[:3]],
    }


def main() -> None:
    measure(__file__, __doc__, SECTIONS, run, limit=540.0, left_out=lambda name: name.startswith("tiny"))


if __name__ == "__main__":
    main()
