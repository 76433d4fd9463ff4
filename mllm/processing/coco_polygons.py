"""Which pixels does a polygon cover by COCO's rule? Its edges are drawn five times as fine, and columns are filled between them.

A port of ``rleFrPoly`` of cocoapi's ``maskApi.c`` (Dollár and Lin, Simplified BSD licence), which makes COCO's and RefCOCO's official
masks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_SCALE = 5.0


def fill_coco_polygon(mask: np.ndarray, points: np.ndarray) -> None:
    """Set the pixels of one closed polygon, ``(k, 2)`` of x and y in pixels, to 1 in ``mask`` ``(height, width)`` uint8."""
    height, width = mask.shape
    corners = np.trunc(_SCALE * points + 0.5).astype(np.int64)
    xs, ys = _boundary(np.concatenate([corners, corners[:1]]))
    moved = np.flatnonzero(np.diff(xs)) + 1
    left = np.minimum(xs[moved], xs[moved - 1])  # neighbours on the boundary are at most one apart
    columns = (left + 0.5) / _SCALE - 0.5
    rows = (np.minimum(ys[moved], ys[moved - 1]) + 0.5) / _SCALE - 0.5
    kept = (np.floor(columns) == columns) & (columns >= 0) & (columns <= width - 1)
    columns, rows = columns[kept].astype(np.int64), np.ceil(rows[kept].clip(0, height)).astype(np.int64)
    crossings = np.bincount(columns * height + rows, minlength=height * width + 1)[: height * width]
    mask |= (np.cumsum(crossings) % 2).astype(np.uint8).reshape((height, width), order="F")


def _boundary(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every point of the edges ``(k + 1, 2)``, in order round the polygon."""
    xs, ys = [], []
    for begin, end in pairwise(corners):
        wide = abs(end[0] - begin[0]) >= abs(end[1] - begin[1])
        long = 0 if wide else 1
        flip = begin[long] > end[long]
        low, high = (end, begin) if flip else (begin, end)
        number = int(high[long] - low[long])
        steps = np.arange(number + 1)[:: -1 if flip else 1]
        slope = (high[1 - long] - low[1 - long]) / number if number else 0.0
        along, across = low[long] + steps, np.trunc(low[1 - long] + slope * steps + 0.5).astype(np.int64)
        xs.append(along if wide else across)
        ys.append(across if wide else along)
    return np.concatenate(xs), np.concatenate(ys)
