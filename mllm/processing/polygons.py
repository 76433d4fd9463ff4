"""Which pixels does a polygon cover? OpenCV's rule: the outline drawn with 8-connected lines, the inside filled row by row.

Annotations of ReasonSeg were scored with masks drawn so (``cv2.polylines`` and ``cv2.fillPoly``), and one pixel's width of outline is a
percent of IoU on a small object.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[int, int]
_ONE = 1 << 16
"""OpenCV's fixed-point unit."""


def fill_polygon(mask: np.ndarray, points: Sequence[Point]) -> None:
    """Set the pixels of one closed polygon, (x, y) in whole pixels, to 1 in ``mask`` ``(height, width)``."""
    edges = list(zip(points, [*points[1:], points[0]]))
    for begin, end in edges:
        _line(mask, begin, end)
    _inside(mask, edges)


def _line(mask: np.ndarray, begin: Point, end: Point) -> None:
    clipped = _clip(mask.shape, begin, end)
    if clipped is None:
        return
    (x, y), (x2, y2) = clipped if clipped[0][0] <= clipped[1][0] else clipped[::-1]
    dx, dy, down = x2 - x, abs(y2 - y), 1 if y2 >= y else -1
    steep = dy > dx
    long, short = (dy, dx) if steep else (dx, dy)
    error = long - 2 * short
    for _ in range(long + 1):
        mask[y, x] = 1
        sideways = error < 0
        error += (2 * long if sideways else 0) - 2 * short
        if steep:
            y, x = y + down, x + sideways
        else:
            x, y = x + 1, y + down * sideways


def _clip(shape: tuple[int, ...], begin: Point, end: Point) -> tuple[Point, Point] | None:
    """The part of a line inside the mask, its new ends cut towards zero as OpenCV cuts them; None: all of it is outside."""
    (x1, y1), (x2, y2) = begin, end
    right, bottom = shape[1] - 1, shape[0] - 1

    def sides(x: int, y: int) -> int:
        return (x < 0) + (x > right) * 2 + (y < 0) * 4 + (y > bottom) * 8

    c1, c2 = sides(x1, y1), sides(x2, y2)
    if c1 & c2 == 0 and c1 | c2:
        if c1 & 12:
            a = 0 if c1 < 8 else bottom
            x1, y1 = x1 + int((a - y1) * (x2 - x1) / (y2 - y1)), a
            c1 = (x1 < 0) + (x1 > right) * 2
        if c2 & 12:
            a = 0 if c2 < 8 else bottom
            x2, y2 = x2 + int((a - y2) * (x2 - x1) / (y2 - y1)), a
            c2 = (x2 < 0) + (x2 > right) * 2
        if c1 & c2 == 0 and c1 | c2:
            if c1:
                a = 0 if c1 == 1 else right
                y1, x1, c1 = y1 + int((a - x1) * (y2 - y1) / (x2 - x1)), a, 0
            if c2:
                a = 0 if c2 == 1 else right
                y2, x2, c2 = y2 + int((a - x2) * (y2 - y1) / (x2 - x1)), a, 0
    return None if c1 | c2 else ((x1, y1), (x2, y2))


def _inside(mask: np.ndarray, edges: Sequence[tuple[Point, Point]]) -> None:
    """Spans between crossings of each row: the pixels whose centres lie inside (the outline is drawn already)."""
    slanted = [(a, b) if a[1] < b[1] else (b, a) for a, b in edges if a[1] != b[1]]
    if not slanted:
        return
    first = max(min(a[1] for a, _ in slanted), 0)
    last = min(max(b[1] for _, b in slanted), mask.shape[0])
    for row in range(first, last):
        crossings = sorted(
            a[0] * _ONE + int((b[0] - a[0]) * _ONE / (b[1] - a[1])) * (row - a[1])
            for a, b in slanted
            if a[1] <= row < b[1]
        )
        for left, right in zip(crossings[::2], crossings[1::2]):
            begin, end = (left + _ONE - 1) >> 16, right >> 16
            mask[row, max(begin, 0) : max(end + 1, 0)] = 1
