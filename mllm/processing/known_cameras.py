"""Where does a frame's camera stand, and what lens has it, for an encoder that reads cameras beside the picture?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.errors import DataError
from mllm.processing.depth_maps import read_poses, tangents
from mllm.processing.geometry import POSE_SIZE, quaternions
from mllm.processing.pixels import placed_at
from mllm.processing.scene_points import beside
from mllm.types import ImageSpec, Video

_log = logging.getLogger(__name__)
POSES = ".poses.json"
"""What the cameras beside a video are called: ``room.mp4.poses.json``."""
_NEAREST = 0.1
"""Least distance that places are divided by, as published."""


def frame_cameras(
    video: Video, numbers: Sequence[int], count: int, image: ImageSpec, *, size: tuple[int, int], where: str
) -> Tensor:
    """The cameras of a video's frames, as Depth Anything 3 (arXiv 2511.10647) is given them.

    Args:
        video: its ``points`` have ``poses`` with ``fov``; else the file of poses beside the video tells them.
        numbers: the frames, in the order shown.
        count: frames of the whole video.
        image: of the encoder, on which the lens depends.
        size: (height, width) of the frames.
        where: what an error begins with.

    Returns:
        ``(F, 9)`` float32: place (in medians of the cameras' distances from the first one) and turn (quaternion x, y, z, w ≥ 0) of each
        camera as the first one shown sees the world, and the vertical and horizontal field of view in radians of what the encoder is
        given. All NaN, of every frame, where the camera of one is not known (and ``image.cameras`` lets that through) and in a video
        that is shown grey.

    Raises:
        DataError: a camera is not known and the encoder refuses that, or what tells them does not fit the video.
    """
    nothing = torch.full((len(numbers), POSE_SIZE), torch.nan)
    entry = _poses_of(video)
    if video.play == "gray" or (entry is None and image.cameras == "unknown"):
        return nothing
    if entry is None:
        raise DataError(
            f"{where} reads cameras (known: [cameras]), and nothing tells this video's; a row gives poses with fov, an entry points: "
            f"{{poses: …}}, or a file clip.mp4{POSES} lies beside it (missing: unknown lets such videos through)"
        )
    poses, view = read_poses(entry, where=where)
    if len(poses) != count:
        raise DataError(f"{where}: {len(poses)} poses for a video of {count} frames; give one for each of its frames")
    if view is None:
        raise DataError(
            f"{where} reads the cameras' lenses; add fov: [vertical, horizontal] degrees to the poses of this video"
        )
    shown = poses[list(numbers)]
    lost = [number for number, camera in zip(numbers, shown, strict=True) if not np.isfinite(camera).all()]
    if lost and image.cameras == "unknown":
        _tell_dropped(where, lost[0], len(lost), len(numbers))
        return nothing
    if lost:
        raise DataError(
            f"{where} reads the cameras of all frames that are seen, and that of frame {lost[0]} is not known (null, NaN or infinite); "
            "missing: unknown shows such a video without its cameras"
        )
    return torch.from_numpy(_encoded(shown, _lens(view, size, image, where)).astype(np.float32))


@lru_cache(maxsize=64)
def _tell_dropped(where: str, frame: int, lost: int, shown: int) -> None:
    """Said once a video: the encoder is given the cameras of all frames or of none, as its authors train it."""
    _log.warning(
        "%s: the camera of frame %d is not known (%d of %d frames seen), so that the video is seen without any camera",
        where, frame, lost, shown,
    )  # fmt: skip


def _encoded(cameras: np.ndarray, view: tuple[float, float]) -> np.ndarray:
    """Cameras ``(F, 3, 4)`` (camera → world) as ``(F, 9)``. view: radians."""
    first = cameras[0]
    places = (cameras[:, :, 3] - first[:, 3]) @ first[:, :3]
    distances = np.sort(np.linalg.norm(places, axis=1))
    places /= max(distances[(len(distances) - 1) // 2], _NEAREST)  # of an even number the lower middle, as published
    turns = quaternions(first[:, :3].T @ cameras[:, :, :3])
    return np.concatenate([places, turns, np.tile(view, (len(cameras), 1))], axis=1)


def _lens(view: tuple[float, float], size: tuple[int, int], image: ImageSpec, where: str) -> tuple[float, float]:
    """Radians that the encoder's input shows of frames with this field of view: less of a frame that is cropped, more of one that is
    padded."""
    _, _, height, width = placed_at(size, image)
    down, across = tangents(view, size, where)
    return 2 * float(np.arctan(down * image.height / height)), 2 * float(np.arctan(across * image.width / width))


def _poses_of(video: Video) -> Any:
    told = video.points.get("poses") if isinstance(video.points, Mapping) else None
    if told is not None:
        return told
    path = beside(video.source, POSES)
    return None if path is None else str(Path(path))


def with_cameras(pixels: Tensor, cameras: Tensor) -> Tensor:
    """Pixels ``(F, 3, H, W)`` and cameras ``(F, 9)`` → ``(F, 4, H, W)``: the first nine cells of the fourth channel, row by row, are the
    camera, the others 0."""
    channel = torch.zeros(len(pixels), pixels.shape[2] * pixels.shape[3], dtype=pixels.dtype)
    channel[:, :POSE_SIZE] = cameras
    return torch.cat([pixels, channel.view(len(pixels), 1, *pixels.shape[2:])], dim=1)


def without_cameras(pixels: Mapping[str, Tensor], specs: Mapping[str, ImageSpec], where: str) -> dict[str, Tensor]:
    """Every encoder's pixels ``(…, 3, H, W)`` of a picture, of whose camera nothing is told, with the channel of those that read
    cameras. Raises `DataError` for one that refuses."""
    found = dict(pixels)
    for name in pixels:
        if specs[name].cameras == "refuse":
            raise DataError(
                f"{where} is a picture, and encoder {name!r} reads the cameras of a video's frames (known: [cameras]); missing: unknown "
                "lets pictures through"
            )
        if specs[name].cameras is not None:
            views = pixels[name].reshape(-1, *pixels[name].shape[-3:])
            laid = with_cameras(views, torch.full((len(views), POSE_SIZE), torch.nan))
            found[name] = laid.view(*pixels[name].shape[:-3], *laid.shape[1:])
    return found
