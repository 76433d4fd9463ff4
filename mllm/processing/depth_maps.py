"""How are a row's camera poses and depth maps read, and laid on what an encoder sees of a picture?"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.errors import DataError
from mllm.processing.images import MAX_PIXELS, read_bytes
from mllm.processing.pixels import placed_at
from mllm.references import natural_order
from mllm.types import ImageSpec

_DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
_FAR = 300.0
"""Metres: half of a map beyond them is taken for a unit that was not told, unless ``unit: 1`` says it."""
_SQUARE, _ALIKE = 0.2, 0.05
"""Shares by which pixels are far from square, and by which they are nearly so."""


def read_poses(entry: Any, *, where: str) -> tuple[np.ndarray, tuple[float, float] | None]:
    """A video's cameras and their field of view.

    entry: ``{"matrices": one of 3 × 4 or 4 × 4 a frame, or null}``, ``{"path": FILE}`` or a file's path (``.npy`` ``(F, 3 | 4, 4)``,
    ``.json`` a list or matrices with their fov, ``.txt`` a line of 12 or 16 numbers a frame); beside it ``fov``: [vertical, horizontal]
    degrees. A matrix takes the camera's coordinates to the world's; x points right, y down, z forward (OpenCV), in metres.

    Returns ``(F, 3, 4)`` float64, NaN for a camera that is not known, and the field of view in degrees (None: not told). Raises
    `DataError` opening with ``where``.
    """
    view = None
    if isinstance(entry, Mapping):
        strange = sorted(map(str, set(entry) - {"matrices", "path", "fov"}))
        if strange or ("matrices" in entry) == ("path" in entry):
            told = strange[0] if strange else "matrices and path" if "path" in entry else "neither matrices nor path"
            raise DataError(f"{where}: an entry has matrices or path, and perhaps fov; this one has {told}")
        view = None if entry.get("fov") is None else _field_of_view(entry["fov"], where)
        entry = entry.get("matrices", entry.get("path"))
    values = _pose_file(entry, where) if isinstance(entry, (str, Path)) else entry
    if isinstance(values, Mapping) and isinstance(entry, (str, Path)):
        if "path" in values or (view is not None and "fov" in values):
            told = "names another file" if "path" in values else "says fov, and so does the row"
            raise DataError(f"{where}: {str(entry)!r} {told}; expected matrices, with fov there or in the row")
        cameras, own = read_poses(values, where=f"{where}: {str(entry)!r}")
        return cameras, own or view
    if isinstance(values, (list, tuple)):
        shape = next((np.shape(one) for one in values if one is not None), (3, 4))
        values = [np.full(shape, np.nan).tolist() if one is None else one for one in values]
    try:
        cameras = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: matrices that are no numbers ({error})") from error
    if cameras.ndim == 2 and cameras.shape[1] in (12, 16):
        cameras = cameras.reshape(len(cameras), -1, 4)
    if cameras.ndim != 3 or cameras.shape[1:] not in ((3, 4), (4, 4)):
        raise DataError(
            f"{where}: poses of shape {cameras.shape}; expected one matrix of 3 × 4 or 4 × 4 for each frame"
        )
    _check_cameras(cameras, where)
    return cameras[:, :3], view


def _check_cameras(cameras: np.ndarray, where: str) -> None:
    """Raises `DataError` for a known camera ``(F, 3 | 4, 4)`` that is no rotation and a place: scaled, mirrored, or written by columns."""
    known = np.flatnonzero(np.isfinite(cameras[:, :3]).all((1, 2)))
    turns = cameras[known, :3, :3]
    off = np.abs(turns @ turns.transpose(0, 2, 1) - np.eye(3)).max((1, 2)) if len(known) else np.zeros(0)
    for number in known[(off > 1e-2) | (np.linalg.det(turns) < 0)][:1]:
        raise DataError(
            f"{where}: the matrix of frame {number} turns by no rotation (its columns are not at right angles and of length 1, or it "
            "mirrors); expected camera to world, x right, y down, z forward"
        )
    if cameras.shape[1] == 4 and len(known):
        for row in cameras[known, 3][np.abs(cameras[known, 3] - (0, 0, 0, 1)).max(1) > 1e-4][:1]:
            raise DataError(
                f"{where}: the last row of a matrix is {row.tolist()}, expected 0 0 0 1; where the place stands there, the matrices are "
                "written by columns: transpose them"
            )


def tangents(view: tuple[float, float], shape: tuple[int, int], where: str) -> tuple[float, float]:
    """Tangents of half the vertical and half the horizontal field of view (degrees) of maps (height, width). Raises `DataError` where the
    two were changed one for the other: pixels would be square the other way round alone."""
    down, across = np.tan(np.radians(view) / 2)
    wide = shape[1] / shape[0]
    if abs(across / down / wide - 1) > _SQUARE and abs(down / across / wide - 1) < _ALIKE:
        raise DataError(
            f"{where}: fov is {list(view)} for maps of {shape[1]} × {shape[0]}; expected [vertical, horizontal], so the other way round"
        )
    return float(down), float(across)


def _field_of_view(value: Any, where: str) -> tuple[float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, (int, float)) for n in value)
    if not good or not all(0 < number < 180 for number in value):
        raise DataError(f"{where}: fov is {value!r}; expected [vertical, horizontal] degrees between 0 and 180")
    if max(value) < np.pi:
        raise DataError(f"{where}: fov is {value!r}, which is radians; expected [vertical, horizontal] in degrees")
    return float(value[0]), float(value[1])


def _pose_file(path: str | Path, where: str) -> Any:
    data, kind = read_bytes(str(path), where=where), Path(path).suffix.lower()
    try:
        if kind == ".npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        if kind == ".json":
            return json.loads(data)
        if kind == ".txt":
            return np.loadtxt(io.BytesIO(data), ndmin=2)
    except Exception as error:  # readers of foreign files raise whatever they like
        raise DataError(f"{where}: {str(path)!r} holds no poses ({error})") from error
    raise DataError(f"{where}: {str(path)!r} is no file of poses; expected .npy, .json or .txt")


def lay_depth(depth: np.ndarray, image: ImageSpec, size: tuple[int, int]) -> Tensor:
    """A map ``(height, width)`` of a picture → ``size`` (rows, columns) on what the encoder sees of it: the value in the middle of each
    cell (a mean over an edge would be neither's depth), NaN beside the picture."""
    rows, columns = (
        np.floor(share * number).astype(int)
        for share, number in zip(
            shares_of_cells((depth.shape[0], depth.shape[1]), image, size), depth.shape, strict=True
        )
    )
    inside = ((rows >= 0) & (rows < depth.shape[0]))[:, None] & ((columns >= 0) & (columns < depth.shape[1]))
    taken = depth[rows.clip(0, depth.shape[0] - 1)][:, columns.clip(0, depth.shape[1] - 1)]
    return torch.from_numpy(np.where(inside, taken, np.nan).astype(np.float32))


def shares_of_cells(shape: tuple[int, int], image: ImageSpec, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How far down and across a picture of this (height, width) the middles of ``size`` (rows, columns) cells of what the encoder sees
    lie: 0 at its edge, 1 at the other, beyond where they show none of it."""
    top, left, height, width = placed_at(shape, image)
    down = ((np.arange(size[0]) + 0.5) * image.height / size[0] - top) / height
    across = ((np.arange(size[1]) + 0.5) * image.width / size[1] - left) / width
    return down, across


class DepthMaps:
    """A visual's depth maps, read one by one.

    entry: a file, a folder of files, a list of files (null: not known), or ``{"path" | "frames": …, "unit": metres}``. ``.npy`` files
    hold ``(height, width)`` or all frames ``(F, height, width)``.
    """

    def __init__(self, entry: Any, where: str):
        self.where, self.unit = where, None
        if isinstance(entry, Mapping):
            strange = sorted(map(str, set(entry) - {"path", "frames", "unit"}))
            if strange or ("path" in entry) == ("frames" in entry):
                told = strange[0] if strange else "path and frames" if "path" in entry else "neither path nor frames"
                raise DataError(f"{where}: an entry has path or frames, and perhaps unit; this one has {told}")
            self.unit = entry.get("unit")
            if self.unit is not None and not (isinstance(self.unit, (int, float)) and self.unit > 0):
                raise DataError(
                    f"{where}: unit is {self.unit!r}; expected the metres that one stored unit stands for, as 0.001"
                )
            entry = entry.get("path", entry.get("frames"))
        self.whole: np.ndarray | None = None
        self.path = entry if isinstance(entry, (str, Path)) else None
        self.files: list[Any] = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        if isinstance(entry, np.ndarray):
            self._take(entry)
        elif isinstance(entry, (str, Path)) and Path(entry).is_dir():
            self.files = _files_of_folder(str(entry))
            if not self.files:
                raise DataError(f"{where}: folder {str(entry)!r} holds no depth maps ({', '.join(_DEPTH_SUFFIXES)})")
        elif isinstance(entry, (str, Path)) and str(entry).lower().endswith(".npy"):
            self._take(_array(entry, where))

    def _take(self, whole: np.ndarray) -> None:
        self.whole = whole[None] if whole.ndim == 2 else whole
        if self.whole.ndim != 3:
            raise DataError(
                f"{self.where}: depth of shape {whole.shape}; expected (frames, height, width) or (height, width)"
            )

    def __len__(self) -> int:
        return len(self.files) if self.whole is None else len(self.whole)

    def file(self, number: int) -> Any:
        """The file in which a map lies; None where it is in memory or not known."""
        source = self.path if self.whole is not None else self.files[number]
        return source if isinstance(source, (str, Path)) else None

    def read(self, number: int) -> np.ndarray | None:
        """Metres ``(height, width)``, NaN where nothing is known; None for a map that is not there."""
        where = f"{self.where}, frame {number}"
        source = self.files[number] if self.whole is None else self.whole[number]
        if source is None:
            return None
        values = np.asarray(source if isinstance(source, np.ndarray) else _map(source, where))
        if values.ndim != 2 or not values.size:
            raise DataError(f"{where}: depth of shape {values.shape}; expected one channel (height, width)")
        if values.dtype.kind in "iu" and self.unit is None:
            raise DataError(
                f"{where}: whole numbers, and nothing says what they stand for; write {{path: …, unit: 0.001}} for millimetres"
            )
        if values.dtype.kind not in "iuf":
            raise DataError(f"{where}: depth of type {values.dtype}; expected whole or decimal numbers")
        metres = values.astype(np.float32) * np.float32(1 if self.unit is None else self.unit)
        if (metres < 0).any():
            raise DataError(
                f"{where}: the depth {float(metres[metres < 0][0]):g} lies behind the camera; write NaN or 0 for unknown"
            )
        known = np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(np.nan))
        some = known[:: max(1, known.shape[0] // 32), :: max(1, known.shape[1] // 32)]
        some = some[np.isfinite(some)]
        if (self.unit is None or self.unit > 1) and len(some) and (middle := float(np.median(some))) > _FAR:
            raise DataError(
                f"{where}: half of it lies beyond {middle:g} metres; write {{path: …, unit: 0.001}} for millimetres, unit: 1 where it is so"
            )
        return known


@lru_cache(maxsize=256)
def _files_of_folder(folder: str) -> list[str]:
    found = [file for file in Path(folder).iterdir() if file.suffix.lower() in _DEPTH_SUFFIXES]
    return [str(file) for file in sorted(found, key=natural_order)]


def _array(path: str | Path, where: str) -> np.ndarray:
    """A ``.npy`` file, of which only what is used is read."""
    if not Path(path).is_file():
        raise DataError(f"{where}: no such file of depth: {str(path)!r}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise DataError(f"{where}: {str(path)!r} holds no array ({error})") from error


def _map(source: Any, where: str) -> np.ndarray:
    if isinstance(source, (str, Path)) and str(source).lower().endswith(".npy"):
        return _array(source, where)
    data = read_bytes(source, where=where)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "TIFF"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{where}: a depth map of {picture.width} × {picture.height} pixels is above the limit")
            if picture.mode in ("P", "PA"):
                raise DataError(
                    f"{where}: a map with a palette, whose numbers are those of colours; save the depth itself"
                )
            return np.asarray(picture)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: the depth map is no PNG, TIFF or .npy file ({error})") from error
