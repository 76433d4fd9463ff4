"""What must a processor know of the poses and depth maps that a model's heads learn from?"""

from __future__ import annotations

from mllm.config import StrictModel
from mllm.types import ImageSpec


class GeometrySpec(StrictModel):
    """poses: a head learns camera poses; depth: (rows, columns) of the maps that a head learns (None: none does); image: what the encoder
    sees that the maps lie on."""

    poses: bool = False
    depth: tuple[int, int] | None = None
    image: ImageSpec
