"""How is a mask written: PNG, run lengths, polygons, boxes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from mllm.errors import DataError
from mllm.processing.coco_polygons import fill_coco_polygon
from mllm.processing.polygons import fill_polygon

IGNORE_PIXEL = 255
"""Value of pixels that neither train nor count."""


def read_mask(entry: Any, size: tuple[int, int], *, where: str) -> np.ndarray:
    """One mask as uint8 ``(height, width)``: 0, 1, and 255 where pixels do not count.

    entry: None (nothing is there), an array or PIL picture, a picture's path or bytes, ``{"size": [h, w], "counts": …}`` (COCO's run
    lengths, plain or compressed), a list of these (their union), or polygons ``[[x, y, x, y, …], …]`` (ReasonSeg's rule;
    ``{"polygons": …}``: COCO's, as its annotations mean); ``{"path": …, "foreground": v}`` for pictures whose foreground is another
    value than 1; ``{"values": array}``: a mask that is known to be one, so that 255 without a 1 means that some pixels do not count and
    nothing is there. size: the picture's. Raises `DataError` opening with ``where``.
    """
    height, width = size
    if entry is None or (isinstance(entry, (list, tuple)) and not entry):
        return np.zeros(size, np.uint8)
    if isinstance(entry, Mapping) and "counts" in entry:
        mask = decode_rle(entry, where=where)
    elif isinstance(entry, Mapping) and "polygons" in entry:
        mask = draw_polygons(entry["polygons"], size, rule="coco", where=where)
    elif isinstance(entry, Mapping) and "values" in entry:
        mask = np.asarray(entry["values"], np.uint8)
    elif isinstance(entry, (list, tuple)) and isinstance(entry[0], Mapping):
        parts = [read_mask(part, size, where=where) for part in entry]
        mask = np.maximum.reduce(parts)  # run lengths that overlap are one mask: never a 2
    elif isinstance(entry, (list, tuple)):
        mask = draw_polygons(entry, size, where=where)
    else:
        mask = _picture(entry, where)
    if mask.shape != (height, width):
        raise DataError(
            f"{where}: the mask is {mask.shape[1]} × {mask.shape[0]} pixels and its picture {width} × {height}; a mask has its "
            "picture's size"
        )
    return mask


def _picture(entry: Any, where: str) -> np.ndarray:
    from mllm.processing.images import read_bytes

    foreground = None
    if isinstance(entry, Mapping) and "foreground" in entry:
        foreground, entry = entry["foreground"], entry.get("path", entry.get("bytes"))
    if isinstance(entry, np.ndarray):
        values = entry
    elif isinstance(entry, Image.Image):
        values = np.asarray(entry)
    else:
        import io

        try:
            with Image.open(io.BytesIO(read_bytes(entry, where=where)), formats=["PNG", "TIFF", "BMP"]) as picture:
                values = np.asarray(picture)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: the mask is no PNG, TIFF or BMP picture ({error})") from error
    if values.ndim != 2:
        raise DataError(f"{where}: the mask has shape {values.shape}; expected one channel (height, width)")
    if values.dtype == bool:
        return values.astype(np.uint8)
    if foreground is not None:
        return (values == foreground).astype(np.uint8)
    found = [value.item() for value in np.unique(values)]
    strange = [value for value in found if value not in (0, 1, IGNORE_PIXEL)]
    if strange:
        raise DataError(
            f"{where}: the mask holds the value {strange[0]}; expected 0, 1 and 255 (pixels that do not count), or "
            f"{{path: …, foreground: {strange[0]}}}"
        )
    if IGNORE_PIXEL in found and 1 not in found:
        raise DataError(
            f"{where}: the mask holds 255, pixels that do not count, and no 1. If 255 is the foreground, write "
            "{path: …, foreground: 255}; a target of nothing is null"
        )
    return values.astype(np.uint8)


# Run lengths, column by column as COCO has them -------------------------------------------------------------------------


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask ``(height, width)`` of 0 and 1 → ``{"size": [h, w], "counts": "…"}``, COCO's compressed form."""
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": _pack(counts)}


def decode_rle(entry: Mapping[str, Any], *, where: str = "mask") -> np.ndarray:
    """Run lengths → uint8 ``(height, width)`` of 0 and 1. Raises `DataError` when they do not add up to the size."""
    try:
        height, width = (int(side) for side in entry["size"])
        counts = entry["counts"]
        if isinstance(counts, (str, bytes)):
            counts = _unpack(counts if isinstance(counts, bytes) else counts.encode("ascii"))
        counts = np.asarray(counts, np.int64)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{where}: no run lengths as COCO writes them, {{size: [h, w], counts: …}} ({error})") from None
    if counts.ndim != 1:
        raise DataError(f"{where}: run lengths are a list of numbers, got an array of shape {counts.shape}")
    if (counts < 0).any():
        raise DataError(f"{where}: run lengths are numbers of pixels, got {int(counts[counts < 0][0])}")
    if (counts > height * width).any() or int(counts.sum()) != height * width:
        raise DataError(
            f"{where}: the run lengths cover {int(counts.sum())} pixels, a mask of {height} × {width} has {height * width}"
        )
    flat = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    return flat.reshape((height, width), order="F")


def _pack(counts: Sequence[int]) -> str:
    """COCO's text: from the fourth number on the difference to the last but one, five bits a letter."""
    letters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits, value = value & 0x1F, value >> 5
            more = value != (-1 if bits & 0x10 else 0)
            letters.append(chr((bits | 0x20 if more else bits) + 48))
            if not more:
                break
    return "".join(letters)


def _unpack(text: bytes) -> list[int]:
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            if shift > 60:
                raise ValueError("a number of more than 64 bits")
            bits = text[place] - 48
            value |= (bits & 0x1F) << shift
            more, place, shift = bool(bits & 0x20), place + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        counts.append(value + counts[len(counts) - 2] if len(counts) > 2 else value)
    return counts


# Polygons and boxes ------------------------------------------------------------------------------------------------------


def draw_polygons(
    polygons: Sequence[Any], size: tuple[int, int], *, rule: Literal["opencv", "coco"] = "opencv", where: str = "mask"
) -> np.ndarray:
    """Polygons ``[[x, y, x, y, …], …]`` or ``[[[x, y], …], …]`` → uint8 ``(height, width)``; a pixel inside several is 1.

    rule: opencv cuts corners to whole pixels and draws the outline, as ReasonSeg's masks are made; coco is that of COCO's and RefCOCO's."""
    mask = np.zeros(size, np.uint8)
    for polygon in polygons:
        try:
            points = np.asarray(polygon, float).reshape(-1, 2)
        except ValueError as error:
            raise DataError(f"{where}: a polygon is a list of x, y pairs, got {polygon!r:.80} ({error})") from None
        finite = int(np.isfinite(points).all(1).sum())
        if len(points) < 3 or finite < len(points):
            raise DataError(
                f"{where}: a polygon needs at least three points with finite x and y, got {len(points)}, {finite} of them finite"
            )
        if min(size) > 2 and points.min() >= 0 and points.max() <= 1:
            raise DataError(
                f"{where}: a polygon's points lie between 0 and 1, as shares of the picture; expected pixels"
            )
        if (points.min(0) > size[::-1]).any() or (points.max(0) < 0).any():
            raise DataError(
                f"{where}: a polygon lies beside its picture of {size[1]} × {size[0]}; is it of another size?"
            )
        if rule == "coco":
            fill_coco_polygon(mask, points)
        else:
            fill_polygon(mask, [(int(x), int(y)) for x, y in points])
    return mask


def reasonseg_mask(annotation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """A ReasonSeg annotation (``shapes`` of ``label`` and ``points``) → uint8 ``(height, width)`` of 0, 1 and 255: the largest
    shape is painted first, labels that hold ``ignore`` paint 255, ``flag`` paints nothing (LISA's rule)."""
    shapes = [shape for shape in annotation["shapes"] if str(shape["label"]).lower() != "flag"]
    drawn = [(draw_polygons([shape["points"]], size), "ignore" in str(shape["label"]).lower()) for shape in shapes]
    mask = np.zeros(size, np.uint8)
    for area, ignored in sorted(drawn, key=lambda pair: -int(pair[0].sum())):
        mask[area > 0] = IGNORE_PIXEL if ignored else 1
    return mask


def box_of(mask: np.ndarray) -> list[int] | None:
    """``[x, y, width, height]`` around a mask ``(height, width)``; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def outlines(mask: np.ndarray) -> list[list[int]]:
    """Closed rings ``[x, y, x, y, …]`` along the pixels' edges of a mask ``(height, width)``; an inner ring goes round a hole.

    Filled by the even-odd rule at the pixels' centres they give the mask again."""
    padded = np.pad(np.asarray(mask, bool), 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(starts: np.ndarray, begin: tuple[int, int], end: tuple[int, int]) -> None:
        for y, x in np.argwhere(starts).tolist():
            following.setdefault((x - 1 + begin[0], y - 1 + begin[1]), []).append((x - 1 + end[0], y - 1 + end[1]))

    inner = padded[1:-1, 1:-1]
    edges = [
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    ]
    for neighbour, begin, end in edges:
        add(np.pad(inner & ~neighbour, 1), begin, end)
    rings = []
    while following:
        start = next(iter(following))
        ring, here, last = [], start, None
        while True:
            choices = following[here]
            there = choices.pop(0 if last is None else _turn(here, last, choices))
            if not choices:
                del following[here]
            if last is None or _direction(last, here) != _direction(here, there):
                ring.append(here)
            last, here = here, there
            if here == start:
                break
        if len(ring) > 1 and _direction(last, start) == _direction(ring[0], ring[1]):
            ring = ring[1:]  # the start lies on a straight edge
        rings.append([value for point in ring for value in point])
    return rings


def _direction(begin: tuple[int, int], end: tuple[int, int]) -> tuple[int, int]:
    return int(np.sign(end[0] - begin[0])), int(np.sign(end[1] - begin[1]))


def _turn(here: tuple[int, int], last: tuple[int, int], choices: list[tuple[int, int]]) -> int:
    """Where two pixels touch at a corner, go round the same pixel: turn right."""
    dx, dy = _direction(last, here)
    right = (-dy, dx)
    return next((k for k, there in enumerate(choices) if _direction(here, there) == right), 0)
