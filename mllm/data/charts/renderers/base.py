"""What does a renderer take and give, and how does its picture become a small file?"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from mllm.data.charts.chart import COLOURS, Chart
from mllm.errors import DataError


@dataclass(frozen=True)
class Style:
    """What differs between charts of one renderer and says nothing. font_size: in points at 100 dots an inch."""

    font_size: float
    grid: bool
    background: str
    bold_title: bool
    line_width: float
    legend: str
    serif: bool

    @classmethod
    def of(cls, rng: random.Random) -> Style:
        return cls(
            font_size=rng.uniform(7.5, 9.5),
            grid=rng.random() < 0.6,
            background=rng.choice(["#ffffff", "#ffffff", "#ffffff", "#f4f4f4", "#fdf8ec"]),
            bold_title=rng.random() < 0.3,
            line_width=rng.uniform(1.5, 2.8),
            legend=rng.choice(["best", "upper right", "upper left"]),
            serif=rng.random() < 0.2,
        )


class Renderer:
    """Draws charts as RGB pictures of ``size`` × ``size`` pixels."""

    name: ClassVar[str] = ""

    def __init__(self, size: int = 448):
        self.size = size

    @classmethod
    def require(cls) -> None:
        """Raise `UnavailableError`, naming what to install, where this renderer cannot run here."""

    def draw(self, charts: Sequence[tuple[Chart, Style]]) -> list[Image.Image]:
        """One picture per chart, in order. Raises `DataError` for charts that come out without a picture."""
        raise NotImplementedError


def colour(name: str) -> str:
    """A colour's hexadecimal digits, with ``#``."""
    return COLOURS[name]


def png(image: Image.Image, size: int, colours: int = 96) -> bytes:
    """A palette PNG of a square picture: a chart has few colours, so this is a third of the size and looks the same.

    Raises `DataError` for another size and for a picture of one colour.
    """
    if image.size != (size, size):
        raise DataError(f"a picture of {image.size[0]} x {image.size[1]} pixels where {size} x {size} was asked for")
    rgb = image.convert("RGB")
    if all(low == high for low, high in rgb.getextrema()):  # type: ignore[misc]
        raise DataError("an empty picture")
    buffer = io.BytesIO()
    small = rgb.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(buffer, "png", optimize=False, compress_level=9)
    return buffer.getvalue()
