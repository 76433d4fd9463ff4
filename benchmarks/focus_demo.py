"""Does a small model, trained with a tokenizer and a diffusion decoder of its own, edit what an instruction names and nothing else?

Draws scenes, trains all stages of ``recipes/focus_demo.yaml``, and asks for edits of scenes that were not trained ("Make the red square
blue."). An edit is right by an exact rule (`mllm.eval.metrics.editing`): the thing has the colour that was asked for, and nothing outside
its true mask has changed beyond 30 dB. From which probability a pixel is marked is chosen on scenes of neither training nor test, by masks
alone. Beside it: the same with the true mask, and with the codes of the true edited picture (what marks
and what drawing costs), the plain decoder in the diffusion decoder's place (with the true mask and codes too: what the tokenizer can carry
at all), the edited picture itself (the rule: 100 %), and as controls an instruction that names nothing and that of another picture. Writes
``report.json``.

    python benchmarks/focus_demo.py                        # runs/focus_demo, two CPU cores
    python benchmarks/focus_demo.py --output /tmp/x --train 64 --tests 8 stages.tokenizer.steps=3 stages.decoder.steps=3 \\
        stages.joint.steps=3     # only to try the script
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.edits import INSTRUCTION, prepare_edits, read_edits, train_edit_tokenizer
from mllm.demo.scenes import BLIND, COLOURS
from mllm.eval.metrics.editing import judge_edit
from mllm.heads.build import keep_in_head
from mllm.heads.codes.decoding import CachedDecoder, Drawing, SampleNoise, draw_codes
from mllm.heads.codes.generate import prompt_embeddings
from mllm.heads.editing import edit_pictures
from mllm.heads.segmentation.build import segmentation_heads
from mllm.types import IMAGE_MARK, Turn
from mllm.visual_tokenizers.base import as_unit_range
from mllm.visual_tokenizers.diffusion.edit import edit
from mllm.visual_tokenizers.images import to_pixels
from mllm.visual_tokenizers.sequence import decode_packed, pack_codes

CELL = 4
"""Pixels of a side that a code of the recipe's tokenizer stands for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/focus_demo"))
    parser.add_argument("--train", type=int, default=8000, help="training scenes (default: 8000)")
    parser.add_argument("--tests", type=int, default=200, help="edits that are asked for (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and pictures (default: 0)")
    parser.add_argument(
        "--confusing",
        type=float,
        default=0.3,
        help="share of training scenes where a name needs both words (default: 0.3)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    options = parser.parse_args()
    began = time.perf_counter()

    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    root = options.output
    data = root / "data"
    if not (options.resume and (data / "test.jsonl").exists()):  # its last file
        prepare_edits(
            data, train=options.train, test=options.tests, seed=options.seed, confusing=options.confusing, cell=CELL
        )
    pictures = data / "pictures"
    changes = [
        f"seed={options.seed}",
        f"model.language_model.tokenizer={train_edit_tokenizer(root / 'text_tokenizer')}",
        f"stages.tokenizer.data.options.path={pictures}",
        f"stages.decoder.data.options.path={pictures}",
        f"stages.joint.data.path={data / 'train.jsonl'}",
    ]
    recipe = load_recipe("focus_demo", [*changes, *options.overrides])
    checkpoint = run_recipe(recipe, output=root / "model", resume=options.resume)
    report: dict[str, Any] = {"training_seconds": round(time.perf_counter() - began)}
    model: Any = AutoModelForImageTextToText.from_pretrained(str(checkpoint)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(str(checkpoint))
    threshold = chosen_threshold(model, processor, read_edits(data, "valid"))
    (marks,) = segmentation_heads(model.config.heads)
    keep_in_head(checkpoint, marks, threshold=threshold)  # `mllm edit` and editbench_demo mark by it too
    report |= measure(model, processor, read_edits(data), threshold)
    report["seconds"] = round(time.perf_counter() - began)
    (root / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def chosen_threshold(model: Any, processor: Any, rows: list[dict[str, Any]]) -> float:
    """From which probability a pixel is best marked: where most edits of validation scenes would be right if what is marked were given
    the very colour."""
    found = []
    for threshold in THRESHOLDS:
        marked = model.segment(
            [row["image"] for row in rows],
            [row["instruction"] for row in rows],
            processor=processor,
            threshold=threshold,
        )
        masks = torch.stack([one.union for one in marked])
        found.append(shares(as_unit_range(torch.where(masks[:, None], colours(rows), pixels_of(rows))), rows)["right"])
    return THRESHOLDS[found.index(max(found))]


def measure(model: Any, processor: Any, rows: list[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Shares of right edits in percent, by the way they were made. threshold: probability above which a pixel is marked."""
    device = model.device
    sources = pixels_of(rows).to(device)
    masks = torch.stack([torch.from_numpy(row["mask"]) for row in rows]).to(device)
    images = [row["image"] for row in rows]
    asked = [INSTRUCTION.format(phrase=row["phrase"], colour=row["colour"]) for row in rows]
    blind = [INSTRUCTION.format(phrase=BLIND, colour=row["colour"]) for row in rows]
    tokenizer = model.image_tokenizer
    raw = edits_raw(model, processor, images, asked, threshold=threshold)
    made, hidden, packed = (torch.stack([getattr(one, name) for one in raw]) for name in ("pixels", "mask", "packed"))
    usual, _ = edits(model, processor, images, asked, threshold=0.5)
    marked, _ = edits(model, processor, images, asked, masks=masks)
    unnamed, _ = edits(model, processor, images, blind, threshold=threshold)
    others, _ = edits(model, processor, images, [*asked[1:], *asked[:1]], threshold=threshold)
    with torch.no_grad():
        plain = decode_packed(tokenizer, packed)
        wanted = torch.where(masks[:, None], colours(rows).to(device), sources)
        touched = F.adaptive_max_pool2d(masks[:, None].float(), tokenizer.grid)
        filled = F.interpolate(touched, wanted.shape[2:], mode="nearest") > 0  # as the training pictures are
        codes = tokenizer.encode(torch.where(filled, colours(rows).to(device), sources))
        oracle = as_unit_range(edit(tokenizer.diffusion, sources, masks, codes, seed=0))
        own = as_unit_range(edit(tokenizer.diffusion, sources, hidden, codes, seed=0))
        true, source = pack_codes(tokenizer, codes), pack_codes(tokenizer, tokenizer.encode(sources))
        held = F.adaptive_avg_pool2d(masks[:, None].float(), tokenizer.grid).flatten(1)  # of each code's cell
        told = told_codes(model, processor, images, asked, true, touched.flatten(1) > 0)
        rebuilt = torch.where(masks[:, None], as_unit_range(tokenizer.decode(codes)), as_unit_range(sources))
    plain = torch.where(hidden[:, None], plain, as_unit_range(sources))
    overlap = (hidden & masks).sum((1, 2)) / (hidden | masks).sum((1, 2)).clamp(min=1)
    return {
        "samples": len(rows),
        "threshold": threshold,
        "edits": shares(made, rows),
        "by a threshold of 0.5": shares(usual, rows),
        "mask_iou": round(100 * float(overlap.mean()), 1),
        "with the true mask": shares(marked, rows),
        "codes, drawn": right_codes(packed, true, source, held),
        "codes, each told all before it": right_codes(told, true, source, held),
        "with the true codes": shares(own, rows),
        "with both": shares(oracle, rows),
        "plain decoder": shares(plain, rows),
        "plain decoder with both": shares(rebuilt, rows),
        "the edited picture itself": shares(as_unit_range(wanted), rows),
        "nothing named": shares(unnamed, rows),
        "another's instruction": shares(others, rows),
    }


def edits_raw(model: Any, processor: Any, images: list[str], instructions: list[str], **more: Any) -> list[Any]:
    found: list[Any] = []
    for start in range(0, len(images), 50):
        part = slice(start, start + 50)
        own = {name: value[part] if isinstance(value, torch.Tensor) else value for name, value in more.items()}
        found += edit_pictures(model, images[part], instructions[part], processor=processor, **own)
    return found


def edits(model: Any, processor: Any, images: list[str], instructions: list[str], **more: Any) -> tuple[Any, Any]:
    """Pictures ``(B, 3, H, W)`` in [0, 1] and what was painted anew ``(B, H, W)``."""
    found = edits_raw(model, processor, images, instructions, **more)
    return torch.stack([one.pixels for one in found]), torch.stack([one.mask for one in found])


@dataclass(frozen=True)
class Told(Drawing):
    """Draws the likeliest codes, which are in said, and goes on with the true ones ``(B, S)``."""

    true: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    said: list[torch.Tensor] = field(default_factory=list)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        self.said.append(logits.argmax(1))
        return self.true[:, len(self.said) - 1]


@torch.no_grad()
def told_codes(
    model: Any, processor: Any, images: list[str], instructions: list[str], true: torch.Tensor, changed: torch.Tensor
) -> torch.Tensor:
    """The likeliest code at each place ``(B, S)``, all true codes before it given; changed ``(B, S)``: which change."""
    found = []
    for start in range(0, len(images), 50):
        part = slice(start, start + 50)
        prompts = [[Turn("user", f"{IMAGE_MARK}\n{text}")] for text in instructions[part]]
        noise = SampleNoise(range(len(prompts)), model.device)
        drawing = Told(1.0, 0.0, 0, 0.0, noise, changed[part], true=true[part])
        embeddings, mask = prompt_embeddings(
            model, processor, prompts, [[image] for image in images[part]], drawing, None
        )
        decoder = CachedDecoder(model, mask)
        draw_codes(model, decoder, decoder(embeddings)[:, -1], drawing)
        found.append(torch.stack(drawing.said, 1))
    return torch.cat(found)


def right_codes(codes: torch.Tensor, true: torch.Tensor, source: torch.Tensor, held: torch.Tensor) -> dict[str, float]:
    """Percent of codes ``(B, S)`` that are the edited picture's, where the mask fills the code's cell, where it cuts it, and outside;
    source: those of the picture that is edited (outside, what copying it would reach)."""
    right = (codes == true).float()
    places = {"inside": held == 1, "on the edge": (held > 0) & (held < 1), "outside": held == 0}
    shares = {name: round(100 * float(right[place].mean()), 1) for name, place in places.items() if place.any()}
    return {**shares, "outside, the source's own": round(100 * float((source == true)[held == 0].float().mean()), 1)}


def pixels_of(rows: list[dict[str, Any]]) -> torch.Tensor:
    """The pictures that are edited ``(B, 3, H, W)`` in [-1, 1]."""
    return to_pixels(torch.stack([torch.from_numpy(read(row["image"])) for row in rows]).permute(0, 3, 1, 2))


def colours(rows: list[dict[str, Any]]) -> torch.Tensor:
    """The colours that are asked for ``(B, 3, 1, 1)`` in [-1, 1]."""
    return torch.tensor([COLOURS[row["colour"]] for row in rows])[:, :, None, None] / 127.5 - 1


def shares(pixels: torch.Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
    """right, coloured: percent; outside: median PSNR in dB."""
    made = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    scores = [judge_edit(read(row["image"]), one, row["mask"], row["colour"], COLOURS) for row, one in zip(rows, made)]
    return {
        "right": round(100 * float(np.mean([score.right for score in scores])), 1),
        "coloured": round(100 * float(np.mean([score.coloured for score in scores])), 1),
        "outside_db": round(float(np.median([score.outside for score in scores])), 1),
    }


def read(path: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).copy()


if __name__ == "__main__":
    main()
