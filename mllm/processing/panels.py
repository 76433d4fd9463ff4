"""How does a picture of more than three channels travel where pictures are RGB: as panels under one another in one PNG file?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mllm.errors import DataError
from mllm.types import ImageSpec

PANELS = "panels"
"""Under which a picture says in its ``info`` how many it has."""


_MOST = 32
"""More channels than this, in pictures of 1, 3 or 4 rows, are taken for columns."""


def stack_channels(channels: np.ndarray | Sequence[np.ndarray]) -> Image.Image:
    """One RGB picture of three channels after three, panel under panel; what is missing of the last three is zero.

    channels: ``(H, W, C)``, or parts ``(H, W)`` and ``(H, W, c)`` that are put one behind another (RGB, then depth); uint8, or float in
    [0, 1]. Save it with `save_panels`. Raises `DataError` for other arrays.
    """
    given = [channels] if isinstance(channels, np.ndarray) else list(channels)
    parts = [_eight_bits(part if part.ndim == 3 else part[..., None]) for part in given]
    if len({part.shape[:2] for part in parts}) != 1:
        raise DataError(
            f"channels of different sizes: {', '.join(str(part.shape) for part in parts)}; resize them to one"
        )
    whole = np.concatenate(parts, axis=2)
    whole = np.pad(whole, ((0, 0), (0, 0), (0, -whole.shape[2] % 3)))
    panels = np.split(whole, whole.shape[2] // 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(np.concatenate(panels, axis=0)))
    picture.info[PANELS] = str(len(panels))
    return picture


def _eight_bits(part: np.ndarray) -> np.ndarray:
    if part.ndim != 3 or part.size == 0:
        raise DataError(f"channels of shape {part.shape}: expected (H, W) or (H, W, C)")
    if part.shape[0] in (1, 3, 4) and part.shape[2] > _MOST:
        raise DataError(f"channels of shape {part.shape} seem to be (C, H, W): expected (H, W, C)")
    if part.dtype == np.uint8:
        return part
    if np.issubdtype(part.dtype, np.floating) and np.isfinite(part).all() and part.min() >= 0 and part.max() <= 1:
        return np.rint(part * 255).astype(np.uint8)
    raise DataError(
        f"channels of type {part.dtype}: expected uint8, or float in [0, 1]; scale them (a depth by its largest value)"
    )


def save_panels(picture: Image.Image, file: str | Path) -> None:
    """Write a picture of `stack_channels` as a PNG that says how many panels it has."""
    if Path(file).suffix.lower() != ".png":
        raise DataError(f"{file}: panels are kept in .png files, which say how many there are")
    picture.save(file, "PNG", pnginfo=panel_info(picture))


def panel_info(picture: Image.Image) -> PngInfo | None:
    """What a PNG file of the picture has to say of its panels."""
    if number_of_panels(picture) == 1:
        return None
    info = PngInfo()
    info.add_text(PANELS, str(number_of_panels(picture)))
    return info


def number_of_panels(picture: Image.Image) -> int:
    """1 of an ordinary picture. Raises `DataError` where the file says something that cannot be."""
    said = picture.info.get(PANELS, "1")
    if not str(said).isdigit() or int(said) < 1 or picture.height % int(said):
        raise DataError(
            f"picture of {picture.height} rows says it has {said!r} panels; write it with mllm.processing.panels"
        )
    return int(said)


def like(picture: Image.Image, other: Image.Image) -> Image.Image:
    """``picture``, told to have as many panels as ``other``."""
    if PANELS in other.info:
        picture.info[PANELS] = other.info[PANELS]
    return picture


def as_panels(picture: Image.Image, count: int) -> Image.Image:
    """``picture``, told to have ``count`` panels."""
    picture.info[PANELS] = str(count)
    return picture


def split_panels(picture: Image.Image, spec: ImageSpec) -> tuple[list[Image.Image], ImageSpec]:
    """The panels that an encoder sees, the first ``spec.panels``, and what it wants of each. Raises `DataError` where there are fewer."""
    have = number_of_panels(picture)
    if have < spec.panels:
        raise DataError(
            f"an encoder sees pictures of {spec.panels} panels ({3 * spec.panels} channels), and this one has {have}; join its channels "
            "with mllm.processing.panels (stack_channels, save_panels)"
        )
    each = picture.height // have
    panels = [picture.crop((0, k * each, picture.width, (k + 1) * each)) for k in range(spec.panels)]
    for panel in panels:
        panel.info.pop(PANELS, None)
    return panels, spec.model_copy(update={"height": spec.height // spec.panels, "panels": 1})
