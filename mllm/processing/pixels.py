"""How does an RGB image become the pixels an encoder expects?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError, UnavailableError
from mllm.processing.panels import number_of_panels, split_panels
from mllm.types import ImageSpec

Resampler = Literal["pil", "torch"]
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAX_CANVAS = 64_000_000
_MAX_SHARE = 64
"""Pixels of a padded canvas, or of a picture resized before its crop, above which a thrifty path is taken; so it is when the
canvas holds the picture, or the resized picture the crop, more often than ``_MAX_SHARE`` times."""


def resize(
    image: Image.Image, spec: ImageSpec, *, resampler: Resampler = "pil", array: np.ndarray | None = None
) -> np.ndarray:
    """RGB image → uint8 ``(spec.height, spec.width, 3)`` as ``spec.resize`` and ``spec.interpolation`` say.

    crop is Hugging Face's CLIP preprocessing (shorter side to size, centre crop), squash its SigLIP preprocessing,
    letterbox LLaVA's ``pad`` (mean colour around the picture up to the target's aspect ratio, then one resize). ``pil``
    equals their PIL backends bit for bit; ``torch`` their torchvision backends (transformers' default since 5.0), ≤ 2
    of 255 away from PIL in < 1 % of the values and about four times as fast. array: `values_of` the picture, where the caller has
    them (``torch``).
    """
    _check(image)
    if spec.panels > 1 or number_of_panels(image) > 1:
        panels, one = split_panels(image, spec)
        return np.concatenate([resize(panel, one, resampler=resampler) for panel in panels])
    if resampler == "pil":
        return _with_pil(image, spec)
    return _with_torch(image, values_of(image) if array is None else array, spec)


def values_of(image: Image.Image) -> np.ndarray:
    """uint8 ``(H, W, 3)`` of an RGB image, or ``(H, W, 4)`` where its own memory is read without a copy, the fourth values unused; not
    to be written to. Pillow keeps RGB in four bytes a pixel, and hands it out where it lies in one piece (up to 16 MB) and pyarrow is
    installed."""
    try:
        import pyarrow

        memory = torch.from_dlpack(pyarrow.array(image).flatten())
    except (ImportError, ValueError):  # no pyarrow; a picture in several pieces
        return np.array(image)
    return memory.view(image.height, image.width, 4).numpy()


def to_pixels(image: Image.Image, spec: ImageSpec, *, resampler: Resampler = "pil") -> Tensor:
    """RGB image → float32 ``(3, H, W)`` of one encoder, ``(x / 255 - mean) / std``."""
    return finish(resize(image, spec, resampler=resampler), spec)


def to_pixels_multi(
    image: Image.Image,
    specs: Mapping[str, ImageSpec],
    *,
    resampler: Resampler = "pil",
) -> dict[str, Tensor]:
    """``{name: (3, H, W)}`` for several encoders; specs that resize alike share the work."""
    _check(image)
    blind = next((name for name, spec in specs.items() if spec.points), None)
    if blind is not None:
        raise ConfigError(
            f"encoder {blind!r} is given where a video's pixels lie, not a picture's pixels; no picture is made for it here"
        )
    if number_of_panels(image) > 1 or any(spec.panels > 1 for spec in specs.values()):
        return {name: to_pixels(image, spec, resampler=resampler) for name, spec in specs.items()}
    array = values_of(image) if resampler == "torch" else None
    resized: dict[tuple, np.ndarray] = {}
    result = {}
    for name, spec in specs.items():
        colour = _pad_colour(spec) if spec.resize == "letterbox" else None
        key = (spec.height, spec.width, spec.resize, spec.interpolation, colour)
        if key not in resized:
            resized[key] = _with_pil(image, spec) if array is None else _with_torch(image, array, spec)
        result[name] = finish(resized[key], spec)
    return result


def finish(array: np.ndarray, spec: ImageSpec) -> Tensor:
    """Resized uint8 ``(H, W, 3)`` → ``(3, H, W)`` as `to_pixels` gives it."""
    planes = torch.from_numpy(array).permute(2, 0, 1)
    scale, shift = _affine(spec)
    floats = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.mul_(scale).add_(shift)


def finish_all(arrays: Sequence[np.ndarray], spec: ImageSpec) -> Tensor:
    """`finish` of several views of one encoder → ``(V, 3, H, W)``, rescaled in one pass."""
    planes = torch.empty((len(arrays), 3, *arrays[0].shape[:2]), dtype=torch.uint8)
    for row, array in zip(planes, arrays, strict=True):
        row.copy_(torch.from_numpy(array).permute(2, 0, 1))
    scale, shift = _affine(spec)
    return planes.to(torch.float32).mul_(scale).add_(shift)


def _affine(spec: ImageSpec) -> tuple[Tensor, Tensor]:
    """Factor and summand ``(3, 1, 1)`` that rescale and normalise in one pass."""
    scale = [1 / (255 * s) for s in spec.std]
    shift = [-m / s for m, s in zip(spec.mean, spec.std, strict=True)]
    return torch.tensor(scale).view(3, 1, 1), torch.tensor(shift).view(3, 1, 1)


def _check(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ConfigError(f"pixels are made from RGB images, got mode {image.mode}; use load_image")


def _pad_colour(spec: ImageSpec) -> tuple[int, int, int]:
    r, g, b = (int(channel * 255) for channel in spec.mean)
    return r, g, b


def _cover(width: int, height: int, spec: ImageSpec) -> tuple[int, int, int, int]:
    """(width, height) that a picture is resized to before its crop, and the crop's (left, top)."""
    if spec.height == spec.width:
        short = spec.height
        wide = width > height
        size = (int(short * width / height), short) if wide else (short, int(short * height / width))
    else:
        scale = max(spec.width / width, spec.height / height)
        size = max(spec.width, round(width * scale)), max(spec.height, round(height * scale))
    return *size, (size[0] - spec.width) // 2, (size[1] - spec.height) // 2


def _canvas(width: int, height: int, spec: ImageSpec) -> tuple[int, int, int, int]:
    """(width, height) of the padded picture with the target's aspect ratio, and the picture's (left, top) on it."""
    if width * spec.height >= height * spec.width:
        size = width, max(height, round(width * spec.height / spec.width))
    else:
        size = max(width, round(height * spec.width / spec.height)), height
    return *size, (size[0] - width) // 2, (size[1] - height) // 2


def placed_at(size: tuple[int, int], spec: ImageSpec) -> tuple[float, float, float, float]:
    """(top, left, height, width) of a picture of this (height, width) on the encoder's input, in its pixels; a crop reaches
    beyond it."""
    height, width = size
    if spec.resize == "squash":
        return 0.0, 0.0, float(spec.height), float(spec.width)
    if spec.resize == "crop":
        wide, high, left, top = _cover(width, height, spec)
        return float(-top), float(-left), float(high), float(wide)
    wide, high, left, top = _canvas(width, height, spec)
    down, across = spec.height / high, spec.width / wide
    return top * down, left * across, height * down, width * across


def _huge(width: int, height: int, kept: int) -> bool:
    """Whether an intermediate picture is out of proportion to the pixels that are kept of it (a strip of 1:32 for an encoder
    of 32:1 grows a thousandfold)."""
    return width * height > min(_MAX_CANVAS, _MAX_SHARE * kept)


def _with_pil(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    filter_ = _FILTERS[spec.interpolation]
    target = (spec.width, spec.height)
    if spec.resize == "squash":
        return np.array(image.resize(target, filter_))
    if spec.resize == "crop":
        width, height, left, top = _cover(*image.size, spec)
        if not _huge(width, height, spec.width * spec.height):
            full = image.resize((width, height), filter_)
            return np.array(full.crop((left, top, left + spec.width, top + spec.height)))
        # A strip of 1 × 100 000 would become 5 gigapixels: resample only what survives the crop. PIL keeps box
        # coordinates in float32, so this can be 1 or 2 of 255 away from the long way.
        x, y = image.width / width, image.height / height
        right, bottom = min((left + spec.width) * x, image.width), min((top + spec.height) * y, image.height)
        return np.array(image.resize(target, filter_, box=(left * x, top * y, right, bottom)))
    width, height, left, top = _canvas(*image.size, spec)
    if (width, height) == image.size:
        return np.array(image.resize(target, filter_))
    if spec.interpolation != "nearest":
        # PIL resamples rows first. Padding above and below is constant along rows, so a wide picture's rows can be
        # resampled before the padding exists: the same bits with less work. A tall picture is done so only when the
        # canvas would be huge; then the order of the two passes moves a value by at most 1.
        if width == image.width:
            image = image.resize((spec.width, image.height), filter_)
            width, left = spec.width, 0
        elif _huge(width, height, image.width * image.height):
            image = image.resize((image.width, spec.height), filter_)
            height, top = spec.height, 0
    canvas = Image.new("RGB", (width, height), _pad_colour(spec))
    canvas.paste(image, (left, top))
    return np.array(canvas.resize(target, filter_))


def _with_torch(image: Image.Image, array: np.ndarray, spec: ImageSpec) -> np.ndarray:
    if spec.interpolation not in ("bicubic", "bilinear"):
        raise UnavailableError(f"the torch resampler has no {spec.interpolation} on the CPU; use resampler='pil'")
    target = (spec.height, spec.width)
    if spec.resize == "squash":
        return _interpolate(array, target, spec)
    if spec.resize == "crop":
        width, height, left, top = _cover(*image.size, spec)
        if _huge(width, height, spec.width * spec.height):
            return _with_pil(image, spec)
        return _interpolate(array, (height, width), spec)[top : top + spec.height, left : left + spec.width]
    width, height, left, top = _canvas(*image.size, spec)
    if (width, height) == image.size:
        return _interpolate(array, target, spec)
    if _huge(width, height, image.width * image.height):
        return _with_pil(image, spec)
    canvas = np.empty((height, width, 3), np.uint8)
    colour = np.array(_pad_colour(spec), np.uint8)
    bottom, right = top + image.height, left + image.width
    canvas[:top], canvas[bottom:], canvas[top:bottom, :left], canvas[top:bottom, right:] = (
        colour,
        colour,
        colour,
        colour,
    )
    canvas[top:bottom, left:right] = array[..., :3]
    return _interpolate(canvas, target, spec)


def _interpolate(array: np.ndarray, size: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    if array.shape[:2] == size:
        return array[..., :3]
    planes = torch.from_numpy(array).permute(2, 0, 1)[None]  # channels-last strides select torch's fast kernel
    resized = F.interpolate(planes, size, mode=spec.interpolation, antialias=True, align_corners=False)
    return resized[0, :3].permute(1, 2, 0).numpy()
