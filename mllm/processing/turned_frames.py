"""How is a decoded frame laid upright, by what its file says of how it is shown?"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import DataError

_TURNS: dict[tuple[int, ...], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Signs of (a, b, c, d) in a display matrix: the pixel at (x, y) is shown at (ax + cy, bx + dy)."""
_STRAIGHT = 0.02
"""Share of a matrix's largest number below which another counts as 0: about a degree."""


def upright(frame: Any, where: str, max_pixels: int | None) -> Image.Image:
    """A frame of PyAV as an RGB picture, turned and mirrored as players show it. Raises `DataError` that opens with ``where`` for one
    above ``max_pixels``, and for an angle between quarter turns: its corners would have to be made up, or cut off."""
    if max_pixels is not None and frame.width * frame.height > max_pixels:
        raise DataError(
            f"{where}: has {frame.width} × {frame.height} pixels, above the limit of {max_pixels / 1e6:g} megapixels"
        )
    turn = _turn(frame, where)
    picture = frame.to_image()
    return picture if turn is None else picture.transpose(turn)


def _turn(frame: Any, where: str) -> Image.Transpose | None:
    told = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if told is None:
        return None
    a, b, _, c, d = (float(value) / 2**16 for value in np.frombuffer(told, np.int32)[:5])
    largest = max(map(abs, (a, b, c, d)))
    if not largest:  # some writers leave the matrix empty; players show such a file as it is
        return None
    signs = tuple(int(value > _STRAIGHT * largest) - int(value < -_STRAIGHT * largest) for value in (a, b, c, d))
    if signs not in _TURNS:
        raise DataError(
            f"{where}: the file says that it is shown turned by {-frame.rotation}° clockwise (matrix {a:.3g} {b:.3g} {c:.3g} {d:.3g}); "
            "quarter turns and mirrored films are read: turn it with the program that converts it"
        )
    return _TURNS[signs]
