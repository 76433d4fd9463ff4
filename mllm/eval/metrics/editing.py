"""Has an edit changed what was asked for, and nothing else (drawn scenes: an exact rule)?"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import DataError
from mllm.eval.metrics.base import Mean, Metric, Score, Scored
from mllm.processing.mask_files import decode_rle

PSNR, REACH = 30.0, 60.0
"""An edit is right where nothing outside its mask differs by more than so many dB, and inside the mean colour is within so much of the
one that was asked for (of 255, in each of red, green and blue), and nearer to it than to any other."""
MOST_DB = 99.0
"""What an untouched picture counts as."""


@dataclass
class EditScore:
    """right: by the exact rule; coloured: what is inside the mask has the colour; outside: PSNR in dB of what is outside."""

    right: bool
    coloured: bool
    outside: float


def judge_edit(
    source: np.ndarray, made: np.ndarray, mask: np.ndarray, colour: str, colours: Mapping[str, Sequence[int]]
) -> EditScore:
    """One edit by the exact rule.

    Args:
        source: the picture ``(H, W, 3)`` uint8.
        made: the edited one, of the same size.
        mask: what was to change ``(H, W)`` bool.
        colour: what it was to become, a name of ``colours``.
        colours: name → red, green, blue.

    Returns:
        Its score.
    """
    inside = made[mask].astype(float).mean(0)
    distance = {name: float(np.abs(inside - np.array(value)).max()) for name, value in colours.items()}
    coloured = min(distance, key=distance.__getitem__) == colour and distance[colour] <= REACH
    error = float(((source[~mask].astype(float) - made[~mask].astype(float)) ** 2).mean()) if (~mask).any() else 0.0
    outside = MOST_DB if error == 0 else min(MOST_DB, 10 * float(np.log10(255**2 / error)))
    return EditScore(coloured and outside >= PSNR, coloured, outside)


class EditRule(Metric):
    """Prediction: a JSON object with the edited ``picture`` (PNG in base64), as a task with ``generation: {edits: true}`` gives it. Target:
    ``{"mask": run lengths, "colour": name, "colours": {name: [r, g, b]}, "source": PNG in base64}``."""

    name = "edit_rule"
    protocol = (
        "an edit is right where the thing's mean colour is that which was asked for (within 60 of 255, and nearest to it) and nothing "
        "outside the thing's true mask has changed beyond 30 dB PSNR; an answer without a picture is unparsed and wrong"
    )
    reads_text = False

    @property
    def example(self) -> tuple[Any, Mapping[str, Any]]:  # type: ignore[override]
        """A target of one pixel."""
        mask = {"size": [2, 2], "counts": [0, 1, 3]}
        picture = png_text(np.zeros((2, 2, 3), np.uint8))
        return {
            "mask": mask,
            "colour": "red",
            "colours": {"red": [255, 0, 0], "black": [0, 0, 0]},
            "source": picture,
        }, {}

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        try:
            source = read_png(target["source"])
            mask = np.asarray(decode_rle(target["mask"], where="target")).astype(bool)
            colour, colours = target["colour"], target["colours"]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DataError(f"edit_rule: the target is no edit ({type(error).__name__}: {error})") from None
        try:
            made = read_png(json.loads(prediction)["picture"])
        except (KeyError, TypeError, ValueError, OSError):
            return Score(None, "", "no picture")
        if made.shape != source.shape:
            return Score(None, f"{made.shape[1]} × {made.shape[0]} pixels", "another size")
        found = judge_edit(source, made, mask, colour, colours)
        parts = {"coloured": float(found.coloured), "outside_db": found.outside}
        return Score(float(found.right), "coloured" if found.coloured else "not coloured", "edit", parts)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        coloured, kept = Mean(), Mean()
        for item in items:
            coloured.append(item.score.parts.get("coloured", 0.0))
            kept.append(float(item.score.parts.get("outside_db", 0.0) >= PSNR))
        result = super().aggregate(items)
        if coloured.count:
            result |= {"coloured": self.scale * coloured.value, "left_alone": self.scale * kept.value}
        return result


def png_text(pixels: np.ndarray) -> str:
    """A picture ``(H, W, 3)`` uint8 as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def read_png(text: str) -> np.ndarray:
    """`png_text`, read. Raises `ValueError` or `OSError` for anything else."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))
