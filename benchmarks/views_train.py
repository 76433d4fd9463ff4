"""Does a training step with tiles cost what the same tokens cost as plain pictures and text? `mllm train` itself, watched from outside.

Llama-7B, CLIP-L/336 live and frozen, JPEGs decoded, rows of 4096 packed, each layer compiled, bf16 with fp32 copies. ``tiles``: one
picture of 672 × 336 a row, seen in LLaVA-NeXT's two tiles and a thumbnail (1,752 tokens); ``plain``: three pictures of 336 × 336 a row,
each seen as a whole (1,728 tokens): as many pictures pass the encoder, as many tokens the language model. ``text``: rows of the same
lengths without a picture, which is what the encoder's passes are part of. Compared are useful tokens a second (rows fill the packs a
little differently).
Goal: tiles within 5 % of plain.

    python benchmarks/views_train.py                                     # one GPU, about 4 minutes; also $OUT/views_train.txt
    python benchmarks/views_train.py --size tiny --device cpu --patience 6   # checks the script
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.big_run import CLIP_L, WORDS, compiled_in, measure, watch, write_recipe, write_stripes

SECTIONS = {"plain": 90.0, "tiles": 90.0, "plain again": 80.0, "text": 80.0}
SKIP, STEPS = 4, 16
EXTRA = 24
"""Tokens of a tiled picture that are no cell: a line end behind each row of cells."""


def write_rows(folder: Path, kind: str, *, rows: int, pictures: int, side: int, cells: int) -> Path:
    """Rows of one kind with answers of the same lengths. side: of a whole picture; cells: tokens of one pass of the encoder."""
    write_stripes(folder, pictures, (2 * side if kind == "tiles" else side, side))
    data = []
    for row in range(rows):
        length = (40 + (row * 7919) % 160) // 5 + (
            (3 * cells + EXTRA) // 5 if kind == "text" else 0
        )  # two rows fill a pack
        answer = " ".join(WORDS[(row + k) % len(WORDS)] for k in range(length))
        count = {"tiles": 1, "plain": 3, "text": 0}[kind]
        images = [f"{(count * row + k) % pictures}.jpg" for k in range(count)]
        question = "<image>\n" * count + "What can be seen, and what is it made of?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        data.append({"id": str(row), **({"image": images} if images else {}), "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def training(options: argparse.Namespace, folder: Path, name: str) -> dict:
    from tests.helpers import TINY_CLIP

    tiny, kind = options.size == "tiny", name.split()[0]
    encoder = TINY_CLIP if tiny else {"type": "hf", "architecture": CLIP_L, "layers": [-2], "final_norm": False}
    side = int(encoder["architecture"]["image_size"])
    cells = (side // int(encoder["architecture"]["patch_size"])) ** 2
    rows, pictures = (64, 8) if tiny else (1024, 128)
    data = write_rows(folder / f"{kind}-data", kind, rows=rows, pictures=pictures, side=side, cells=cells)
    short = name.replace(" ", "-")
    recipe = write_recipe(
        folder, options.size, name=short, steps=200, num_workers=6, compile=options.device == "cuda",
        data={"format": "llava", "path": str(data)},
    )  # fmt: skip
    changed = json.loads(recipe.read_text(encoding="utf-8"))
    changed["model"]["encoders"] = {"vision": encoder}
    changed["model"]["connector"] = {"type": "mlp", "depth": 2}
    if kind == "tiles":
        changed["model"]["views"] = {"type": "tiles", "grids": [[1, 2], [2, 1]]}
    recipe.write_text(json.dumps(changed, indent=1), encoding="utf-8")
    limit = SECTIONS[name] * options.patience - 5
    seen = watch(recipe, steps=SKIP + STEPS, limit=limit, arguments=(), **compiled_in(folder))
    shutil.rmtree(folder / short, ignore_errors=True)
    found = {key: seen.middle(key, SKIP) for key in ("seconds", "tokens_per_second", "images_per_second", "fill")}
    rates = [step["tflops"]["language_model"] for step in seen.steps[SKIP:] if "tflops" in step]
    found["tflops"] = sorted(rates)[len(rates) // 2] if rates else None
    return {
        **{key: None if value is None else round(value, 4) for key, value in found.items()},
        "data wait": seen.middle("data_wait", SKIP),
        "memory GB": seen.middle("memory_gb", SKIP),
        "losses": [round(step["loss"], 4) for step in seen.steps[:3]],
        "first step s": seen.first_step,
        "steps seen": len(seen.steps),
    }


def main() -> None:
    rows = measure(__file__, __doc__, SECTIONS, training, limit=340.0)
    rates = {row["section"]: row.get("tokens_per_second") for row in rows if "section" in row}
    plain = [float(rate) for name in ("plain", "plain again") if (rate := rates.get(name))]
    if plain and (tiled := rates.get("tiles")):
        print(f"tiles against plain: {tiled * len(plain) / sum(plain):.3f} of the useful tokens a second")


if __name__ == "__main__":
    main()
