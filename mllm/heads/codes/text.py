"""Which images does a text hold that was written with a token for every code (ILLUME+, arXiv 2504.01934)?"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLACEHOLDER = "<image>"
_IMAGE = re.compile(r"<start_of_image>(.*?)<end_of_image>|<image_start>(.*?)<image_end>", re.DOTALL)
_CODE = re.compile(r"<\|image_level(\d+)_(\d+)\|>")


@dataclass(frozen=True)
class WrittenImages:
    """text: with a placeholder for each image. images: of each, its codes level after level."""

    text: str
    images: list[tuple[list[int], ...]]


def read_images(text: str, *, levels: int = 2, placeholder: str = PLACEHOLDER) -> WrittenImages:
    """A text with codes as ``<|image_level0_3|>`` between ``<start_of_image>`` and ``<end_of_image>`` (ILLUME+'s marks; those of our own
    vocabulary head are read too), taken apart.

    Codes of further levels than ``levels`` and whatever else stands inside an image are left out; text between images stays as it is,
    and so does an image that is never closed.
    """
    images: list[tuple[list[int], ...]] = []

    def taken(match: re.Match[str]) -> str:
        found: tuple[list[int], ...] = tuple([] for _ in range(levels))
        for level, code in _CODE.findall(match[1] if match[1] is not None else match[2]):
            if int(level) < levels:
                found[int(level)].append(int(code))
        images.append(found)
        return placeholder

    return WrittenImages(_IMAGE.sub(taken, text), images)
