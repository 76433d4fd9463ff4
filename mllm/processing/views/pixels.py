"""How do views become pixels? The picture is resized once for all tiles that are cut from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from mllm.errors import DataError
from mllm.processing.panels import number_of_panels
from mllm.processing.pixels import Resampler, finish, finish_all, resize, values_of
from mllm.processing.views.base import View
from mllm.types import ImageSpec


def to_view_pixels(
    image: Image.Image,
    specs: Mapping[str, ImageSpec],
    views: Mapping[str, Sequence[View]],
    *,
    resampler: Resampler = "pil",
) -> dict[str, Tensor]:
    """RGB image → encoder name → ``(V, 3, H, W)``, its views normalised, or ``(N, 3 p²)``, its patches; encoders and tiles that
    resize alike share the work."""
    if number_of_panels(image) > 1:
        raise DataError("a picture of several panels is seen as a whole only; leave model.views out")
    canvases: dict[tuple, np.ndarray] = {}
    array = values_of(image) if resampler == "torch" else None
    pixels = {}
    for name, spec in specs.items():
        if views[name][0].patch:
            pixels[name] = _patches(image, spec, views[name][0], resampler)
            continue
        rows = [_seen(image, spec, view, canvases, resampler, array) for view in views[name]]
        pixels[name] = finish_all(rows, spec)
    return pixels


def _patches(image: Image.Image, spec: ImageSpec, view: View, resampler: Resampler) -> Tensor:
    """``(rows · columns, 3 p²)``: the picture at the view's size in squares, each with all of its red first."""
    (height, width), side = view.picture, view.patch
    whole = spec.model_copy(update={"height": height, "width": width, "resize": "squash"})
    pixels = finish(resize(image, whole, resampler=resampler), whole)
    cells = pixels.reshape(3, height // side, side, width // side, side)
    return cells.permute(1, 3, 0, 2, 4).reshape(-1, 3 * side * side)


def _seen(
    image: Image.Image,
    spec: ImageSpec,
    view: View,
    canvases: dict[tuple, np.ndarray],
    resampler: Resampler,
    array: np.ndarray | None,
) -> np.ndarray:
    """uint8 ``(spec.height, spec.width, 3)`` of one view. array: the picture's values, where ``resampler`` takes them."""
    if view.canvas is None:
        whole = spec.model_copy(update={"resize": "letterbox"}) if view.padded else spec
        return resize(image, whole, resampler=resampler, array=array)
    fit = (spec.resize, spec.mean) if view.as_spec else None
    key = (view.picture, view.canvas, view.place, spec.interpolation, fit)
    if key not in canvases:
        (height, width), (top, left) = view.picture, view.place
        how = spec.resize if view.as_spec else "squash"
        whole = spec.model_copy(update={"height": height, "width": width, "resize": how})
        resized = resize(image, whole, resampler=resampler, array=array)
        if view.picture != view.canvas:
            canvas = np.zeros((*view.canvas, 3), np.uint8)
            canvas[top : top + height, left : left + width] = resized
            resized = canvas
        canvases[key] = resized
    (top, left), step = view.corner, view.stride
    rows, columns = slice(top, top + step * spec.height, step), slice(left, left + step * spec.width, step)
    return canvases[key][rows, columns]
