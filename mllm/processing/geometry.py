"""How do a row's camera poses and depth maps become what heads learn from, frame by frame of what the model sees?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.errors import DataError
from mllm.processing.depth_maps import DepthMaps, lay_depth, read_poses
from mllm.processing.geometry_spec import GeometrySpec
from mllm.processing.images import image_size
from mllm.processing.protocol import Processor
from mllm.processing.videos import Seen, frames_of
from mllm.types import ImageSpec, Sample, Video

_log = logging.getLogger(__name__)
_TOLD: list[str] = []
"""The row of which it was said that some of its depth is not known."""
POSE_SIZE = 9
"""Numbers of one camera's pose as heads learn it: translation (3), unit quaternion (x, y, z, w ≥ 0), vertical and horizontal field of
view in radians. VGGT's encoding (arXiv 2503.11651)."""
_SHAPES_ALIKE = 0.02
"""Share by which a depth map's shape (height : width) may differ from its picture's: sensors crop a little."""


def encode_geometry(
    processor: Processor, spec: GeometrySpec, sample: Sample, visuals: Sequence[Any], *, where: str
) -> dict[str, Tensor]:
    """What the heads learn of a sample's visuals, by batch key; a video has a row for each of its frames that is seen, a picture one,
    and NaN stands for what the row does not tell.

    visuals: those that are read, without any that was cut off. Returns ``target_poses`` ``(ΣF, 9)`` and ``target_depths`` ``(ΣF, rows,
    columns)``, as far as the heads want them. Raises `DataError` for entries that do not fit their visuals, naming them.
    """
    frames = [_frames(processor, visual, f"{where}, image {number}") for number, visual in enumerate(visuals)]
    found: dict[str, Tensor] = {}
    if spec.poses:
        entries = _of_visuals(sample.poses, len(sample.images), "poses", where)[: len(visuals)]
        rows = [_pose_rows(entry, seen, f"{where}, poses {k}") for k, (entry, seen) in enumerate(zip(entries, frames))]
        found["target_poses"] = torch.cat([torch.zeros(0, POSE_SIZE), *rows])
    if spec.depth is not None:
        entries = _of_visuals(sample.depths, len(sample.images), "depths", where)[: len(visuals)]
        maps = [
            _depth_rows(entry, seen, visual, spec.image, spec.depth, f"{where}, depths {k}")
            for k, (entry, seen, visual) in enumerate(zip(entries, frames, visuals))
        ]
        found["target_depths"] = torch.cat([torch.zeros(0, *spec.depth), *maps])
    return found


def _of_visuals(entries: Sequence[Any], count: int, what: str, where: str) -> list[Any]:
    """One entry for each of a sample's ``count`` visuals."""
    if not entries:
        return [None] * count
    if len(entries) != count:
        raise DataError(
            f"{where}: {len(entries)} {what} for {count} images and videos; give one each in their order, null for one without"
        )
    return list(entries)


def _frames(processor: Processor, visual: Any, where: str) -> Seen | None:
    """A video's chosen frames, none of them decoded; None for a picture."""
    if not isinstance(visual, Video):
        return None
    spec = processor.rules.video
    assert spec is not None  # a model that takes no video was given none
    return frames_of(visual, spec, where=where, max_pixels=processor.image_processor.max_pixels)


# Poses -------------------------------------------------------------------------------------------------------------------


def _pose_rows(entry: Any, seen: Seen | None, where: str) -> Tensor:
    """``(F, 9)`` of a video's frames; NaN for a picture, which has no camera but its own."""
    if entry is None:
        return torch.full((1 if seen is None else len(seen.chosen.numbers), POSE_SIZE), torch.nan)
    if seen is None:
        raise DataError(f"{where}: poses are of a video's frames, and this is a picture; write null")
    cameras, view = read_poses(entry, where=where)
    if len(cameras) != seen.clip.count:
        raise DataError(
            f"{where}: {len(cameras)} poses for a video of {seen.clip.count} frames; give one for each of its frames, null or NaN for "
            "those that are not known"
        )
    rows = relative_poses(cameras[list(seen.chosen.numbers)])
    rows[:, 7:] = np.nan if view is None else np.radians(view)
    return torch.from_numpy(rows.astype(np.float32))


def relative_poses(cameras: np.ndarray) -> np.ndarray:
    """Cameras ``(F, 3, 4)`` (camera → world) as the first known one among them sees the world: ``(F, 9)`` of first camera → camera k,
    fields of view left NaN, all NaN for a camera with NaN or infinity (ScanNet writes it where tracking was lost)."""
    rows = np.full((len(cameras), POSE_SIZE), np.nan)
    known = np.flatnonzero(np.isfinite(cameras).all((1, 2)))
    if not len(known):
        return rows
    turns, places = cameras[known, :, :3], cameras[known, :, 3]
    back = turns.transpose(0, 2, 1)  # world → camera
    rows[known, :3] = np.einsum("fij,fj->fi", back, places[0] - places)
    rows[known, 3:7] = quaternions(back @ turns[0])
    return rows


def quaternions(turns: np.ndarray) -> np.ndarray:
    """Rotations ``(F, 3, 3)`` → unit quaternions ``(F, 4)`` (x, y, z, w) with w ≥ 0: for each, the eigenvector of Bar-Itzhack's matrix,
    which also takes matrices that are rotations only nearly."""
    m = turns
    k = np.empty((len(m), 4, 4))
    for row, column, value in (
        (0, 0, m[:, 0, 0] - m[:, 1, 1] - m[:, 2, 2]),
        (1, 1, m[:, 1, 1] - m[:, 0, 0] - m[:, 2, 2]),
        (2, 2, m[:, 2, 2] - m[:, 0, 0] - m[:, 1, 1]),
        (3, 3, m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]),
        (0, 1, m[:, 0, 1] + m[:, 1, 0]),
        (0, 2, m[:, 0, 2] + m[:, 2, 0]),
        (1, 2, m[:, 1, 2] + m[:, 2, 1]),
        (0, 3, m[:, 2, 1] - m[:, 1, 2]),
        (1, 3, m[:, 0, 2] - m[:, 2, 0]),
        (2, 3, m[:, 1, 0] - m[:, 0, 1]),
    ):
        k[:, row, column] = k[:, column, row] = value / 3
    found = np.linalg.eigh(k)[1][..., -1]
    return np.where(found[:, 3:] < 0, -found, found)


# Depth -------------------------------------------------------------------------------------------------------------------


def _depth_rows(
    entry: Any, seen: Seen | None, visual: Any, image: ImageSpec, size: tuple[int, int], where: str
) -> Tensor:
    """``(F, rows, columns)`` metres on what the encoder sees, NaN where they are not known."""
    numbers = [0] if seen is None else list(seen.chosen.numbers)
    if entry is None:
        return torch.full((len(numbers), *size), torch.nan)
    maps = DepthMaps(entry, where)
    count = 1 if seen is None else seen.clip.count
    if len(maps) != count:
        what = "a picture" if seen is None else f"a video of {count} frames"
        raise DataError(f"{where}: {len(maps)} depth maps for {what}; give one each, null for one that is not known")
    shape = image_size(visual, where=where) if seen is None else seen.frame_size()
    read = {number: maps.read(number) for number in sorted(set(numbers))}
    if not any(one is not None and np.isfinite(one).any() for one in read.values()):
        raise DataError(
            f"{where}: no pixel of the depth is known (all are NaN, infinite or 0); leave such rows' depths out"
        )
    unknown = [float(np.mean(~np.isfinite(one))) for one in read.values() if one is not None]
    if any(unknown) and not _TOLD:
        _TOLD.append(where)
        _log.warning(
            "%s: the depth of %.0f %% of its pixels is not known (NaN, infinite or 0); such pixels are left out of the loss, here and in "
            "other rows", where, 100 * np.mean(unknown),
        )  # fmt: skip
    for number, one in read.items():
        if one is not None and abs(one.shape[0] * shape[1] / (one.shape[1] * shape[0]) - 1) > _SHAPES_ALIKE:
            raise DataError(
                f"{where}, frame {number}: a map of {one.shape[1]} × {one.shape[0]} for a picture of {shape[1]} × {shape[0]}; expected "
                "the same shape, at any size"
            )
    empty = torch.full(size, torch.nan)
    laid = {number: empty if one is None else lay_depth(one, image, size) for number, one in read.items()}
    return torch.stack([laid[number] for number in numbers])
