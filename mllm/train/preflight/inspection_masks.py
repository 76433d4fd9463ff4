"""Where do the masks that a batch teaches lie on what the encoder sees?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mllm.processing.segments import IGNORE_PIXEL, SegmentSpec

COLOUR, NOT_COUNTED = (224, 64, 58), (128, 128, 128)


@dataclass
class SeenMask:
    """A mask of a sample. token: its place in the sample; number: its picture; learned: of an answer, else shown by a question; seen: the
    picture with what is marked in red and what does not count in grey; share: of the encoder's input that is marked."""

    token: int
    number: int
    learned: bool
    seen: Image.Image
    share: float


class MaskReader:
    """Takes a batch's masks sample by sample, in their order. spec: of the processor; encoder: which the masks are read from."""

    def __init__(self, spec: SegmentSpec, encoder: str, inputs: Mapping[str, Any]):
        self.spec, self.encoder = spec, encoder
        self.masks: list[Tensor] = list(_given(inputs, "target_masks"))
        self.examples: list[Tensor] = list(_given(inputs, "target_examples"))

    def take(self, ids: Tensor, labels: Tensor, starts: Sequence[int], pictures: Sequence[Any]) -> list[SeenMask]:
        """The next sample's. ids, labels ``(T,)``; starts: first tokens of its pictures; pictures: `Picture`s, views of them."""
        pixels: dict[int, Image.Image] = {}
        for picture in pictures:
            if self.encoder in picture.pixels:
                pixels.setdefault(picture.number, picture.pixels[self.encoder])
        found = []
        example = -1 if self.spec.example is None else self.spec.example.token_id
        for tokens, waiting, learned in (
            (labels == self.spec.token_id, self.masks, True),
            (ids == example, self.examples, False),
        ):
            for token in tokens.nonzero().flatten().tolist():
                mask = waiting.pop(0).numpy()
                number = sum(start < token for start in starts) - 1
                found.append(SeenMask(token, number, learned, _laid(pixels[number], mask), float((mask == 1).mean())))
        return sorted(found, key=lambda one: one.token)


def _given(inputs: Mapping[str, Any], name: str) -> Any:
    return () if inputs.get(name) is None else inputs[name]


def _laid(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    values = np.asarray(picture.convert("RGB").resize(mask.shape[::-1])).astype(np.float32)
    for value, colour in ((1, COLOUR), (IGNORE_PIXEL, NOT_COUNTED)):
        values[mask == value] = 0.4 * values[mask == value] + 0.6 * np.array(colour)
    return Image.fromarray(values.round().astype(np.uint8))
