"""Where does a video's scene lie in space, so that frames can be chosen by what they show of it?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.errors import DataError
from mllm.modes import whole_file
from mllm.processing.depth_maps import DepthMaps, lay_depth, read_poses, shares_of_cells, tangents
from mllm.processing.space_aware import space_aware_frames
from mllm.processing.spread import spread
from mllm.types import ImageSpec, Video

SIDECAR = ".points.npz"
"""What a file of points beside a video is called: ``room.mp4.points.npz``."""
_SIDE = 48
"""Most points along a side of a depth map; of a larger map every so many-th row and column is taken."""


def frames_by_points(
    video: Video, *, frames: int, candidates: int, first: int, last: int, count: int, where: str
) -> list[int]:
    """Up to ``frames`` numbers, ascending, of those that together show most of the scene (`space_aware_frames`); the choice is kept by
    the files it was made from, in the process and below ``$MLLM_CACHE/frames``.

    Args:
        video: its ``points`` say where the scene lies: a ``.npz`` file (``points`` ``(F, H, W, 3)``, perhaps ``confidence``
            ``(F, H, W)`` and ``frames`` ``(F,)``, the numbers of the video's frames that they are of), or ``{"poses": …, "depths": …}``
            as a row has them. None: the file of points beside the video.
        frames: how many.
        candidates: of how many frames, evenly from first to last.
        first: the first frame that may be taken.
        last: the last one.
        count: frames of the whole video.
        where: what an error begins with.

    Returns:
        Numbers of frames; fewer where the rest would show nothing new.

    Raises:
        DataError: nothing says where the scene lies, or what says it does not fit the video.
    """
    points = _told(video)
    if points is None:
        raise DataError(
            f"{where}: frames are chosen by the scene's points (video.which: space_aware), and nothing tells this video's; a row gives "
            f"poses and depths, an entry {{path: clip.mp4, points: clip.npz}}, or the file clip.mp4{SIDECAR} lies beside it"
        )
    asked = (frames, candidates, first, last, count)
    if isinstance(points, (str, Path)):
        path = Path(points)
        if not path.is_file():
            raise DataError(f"{where}: no such file of points: {str(path)!r}")
        stat = path.stat()
        return list(_by_file(str(path), stat.st_mtime_ns, stat.st_size, asked, where))
    cameras, maps, view = _cameras_and_maps(points, count, where)
    taken = [first + place for place in spread(last - first + 1, min(candidates, last - first + 1))]
    files = [maps.file(number) for number in taken]
    if any(file is None for file in files) and maps.whole is not None:  # in memory: nothing tells one from another
        return _cover(*_unprojected(cameras, view, maps, taken), taken, frames, where)
    told = json.dumps(
        [points, [_stamp(file) for file in dict.fromkeys(files) if file is not None], asked],
        default=str,
        sort_keys=True,
    )
    return list(_remembered(told, lambda: _cover(*_unprojected(cameras, view, maps, taken), taken, frames, where)))


def frame_points(video: Video, numbers: Sequence[int], count: int, image: ImageSpec, *, where: str) -> Tensor:
    """Where the pixels of frames lie, as an encoder of points is given it.

    Args:
        video: its ``points`` as for `frames_by_points`.
        numbers: the frames, in the order shown; the first whose camera is known is the one that sees the world from (0, 0, 0).
        count: frames of the whole video.
        image: of the encoder.
        where: what an error begins with.

    Returns:
        ``(F, 3, height, width)`` float32: x right, y down, z forward, in metres (in a file's own unit); NaN where nothing is known, and
        everywhere in a video that is shown grey.

    Raises:
        DataError: nothing tells where the scene lies and the encoder refuses that, or what tells it does not fit.
    """
    points = _told(video)
    if video.play == "gray" or (points is None and image.points == "unknown"):
        return torch.full((len(numbers), 3, image.height, image.width), torch.nan)
    if points is None:
        raise DataError(
            f"{where} reads where the scene lies, and nothing tells it of this video; a row gives poses and depths, an entry points, or a "
            f"file clip.mp4{SIDECAR} lies beside it (missing: unknown lets such videos through)"
        )
    size = (image.height, image.width)
    if isinstance(points, (str, Path)):
        told = _stored(str(points), count, where)
        row_of = {int(number): row for row, number in enumerate(told["frames"])}
        absent = [number for number in numbers if number not in row_of]
        if absent:
            raise DataError(
                f"{where}: {str(points)!r} has points of {len(row_of)} frames, and not of frame {absent[0]}, which is seen"
            )
        laid = [
            torch.stack(
                [lay_depth(channel, image, size) for channel in told["points"][row_of[number]].transpose(2, 0, 1)]
            )
            for number in numbers
        ]
        return torch.stack(laid)
    poses, maps, view = _cameras_and_maps(points, count, where)
    known = [number for number in numbers if np.isfinite(poses[number]).all()]
    rows = []
    for number in numbers:
        depth = maps.read(number)
        if depth is None or not known:
            rows.append(torch.full((3, *size), torch.nan))
            continue
        z = lay_depth(depth, image, size).numpy()
        down, across = tangents(view, (depth.shape[0], depth.shape[1]), where)
        high, wide = shares_of_cells((depth.shape[0], depth.shape[1]), image, size)
        seen = np.stack([(wide * 2 - 1)[None] * across * z, (high * 2 - 1)[:, None] * down * z, z], -1)
        world = seen @ poses[number][:, :3].T + poses[number][:, 3]
        first = poses[known[0]]
        rows.append(torch.from_numpy(((world - first[:, 3]) @ first[:, :3]).astype(np.float32)).permute(2, 0, 1))
    found = torch.stack(rows)
    if not found.isfinite().all(dim=1).any():
        raise DataError(
            f"{where}: no pixel of its frames has both a known depth and a known camera (all are NaN, infinite or 0)"
        )
    return found


def unknown_points(specs: Mapping[str, ImageSpec], where: str) -> dict[str, Tensor]:
    """What encoders of points are given of a picture, of which nothing tells where it lies. Raises `DataError` for one that refuses."""
    found = {name: spec for name, spec in specs.items() if spec.points}
    for name, spec in found.items():
        if spec.points == "refuse":
            raise DataError(
                f"{where} is a picture, and encoder {name!r} reads where a video's pixels lie; missing: unknown lets pictures through"
            )
    return {name: torch.full((3, spec.height, spec.width), torch.nan) for name, spec in found.items()}


def _told(video: Video) -> Any:
    """What tells where a video's scene lies; poses alone do not."""
    points = video.points
    cameras_alone = isinstance(points, Mapping) and set(points) <= {"poses", "depths"} and points.get("depths") is None
    return beside(video.source, SIDECAR) if points is None or cameras_alone else points


def beside(source: Any, suffix: str) -> Path | None:
    """The file that lies beside a video's and is called like it with a suffix; None: there is none."""
    if isinstance(source, Mapping):
        source = source.get("path")
    if not isinstance(source, (str, Path)) or str(source).startswith("data:") or len(str(source)) > 4096:
        return None
    path = Path(f"{source}{suffix}")
    return path if path.is_file() else None


def _stamp(file: Any) -> tuple[str, int, int]:
    with suppress(OSError):
        stat = Path(file).stat()
        return (str(file), stat.st_mtime_ns, stat.st_size)
    return (str(file), 0, 0)  # reading it says what is wrong


def _by_file(path: str, changed: int, size: int, asked: tuple[int, ...], where: str) -> tuple[int, ...]:
    return _remembered(json.dumps([path, changed, size, asked]), lambda: _of_file(path, *asked, where=where))


def _stored(path: str, count: int, where: str) -> dict[str, np.ndarray]:
    """``points``, ``confidence`` and ``frames`` of a file, checked."""
    if not Path(path).is_file():
        raise DataError(f"{where}: no such file of points: {path!r}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            told = {name: stored[name] for name in stored.files}
    except Exception as error:  # readers of foreign files raise whatever they like
        raise DataError(f"{where}: {path!r} holds no points ({error})") from error
    if strange := sorted(set(told) - {"points", "confidence", "frames"}):
        raise DataError(
            f"{where}: {path!r} has {strange[0]!r}, which nothing reads; it may have points, confidence and frames alone"
        )
    points = told.get("points")
    if points is None or points.ndim != 4 or points.shape[3] != 3 or points.dtype.kind != "f":
        shape = None if points is None else points.shape
        raise DataError(
            f"{where}: {path!r} needs points (F, H, W, 3) of decimal numbers; it has {shape} among {sorted(told)}"
        )
    confidence = told.get("confidence", np.ones(points.shape[:3], np.float32))
    numbers = told.get("frames", np.arange(len(points)))
    if confidence.shape != points.shape[:3] or numbers.shape != points.shape[:1]:
        raise DataError(
            f"{where}: {path!r} has points {points.shape}, confidence {confidence.shape} and frames {numbers.shape}; expected one of each "
            "for every frame"
        )
    if "frames" not in told and len(points) != count:
        raise DataError(
            f"{where}: {path!r} has points of {len(points)} frames for a video of {count}; say which in frames"
        )
    if numbers.dtype.kind not in "iu" or len(set(numbers.tolist())) < len(numbers):
        raise DataError(
            f"{where}: the frames of {path!r} are {numbers[:8].tolist()}; expected whole numbers, each once"
        )
    wrong = [int(number) for number in numbers if not 0 <= number < count]
    if wrong:
        raise DataError(f"{where}: {path!r} speaks of frame {wrong[0]} of a video of {count}")
    return {"points": points.astype(np.float32), "confidence": confidence.astype(np.float32), "frames": numbers}


def _of_file(path: str, frames: int, candidates: int, first: int, last: int, count: int, where: str) -> list[int]:
    told = _stored(path, count, where)
    points, confidence, numbers = told["points"], told["confidence"], told["frames"]
    inside = np.flatnonzero((numbers >= first) & (numbers <= last))
    inside = inside[spread(len(inside), min(candidates, len(inside)))] if len(inside) else inside
    if not len(inside):
        raise DataError(f"{where}: {path!r} has points of no frame between {first} and {last}")
    taken = [int(number) for number in numbers[inside]]
    return _cover(points[inside], confidence[inside], taken, frames, where)


def _cover(points: np.ndarray, confidence: np.ndarray, taken: Sequence[int], frames: int, where: str) -> list[int]:
    try:
        chosen = space_aware_frames(torch.from_numpy(points), torch.from_numpy(confidence), frames)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return sorted(taken[place] for place in chosen)


def _cameras_and_maps(points: Any, count: int, where: str) -> tuple[np.ndarray, DepthMaps, tuple[float, float]]:
    """Cameras ``(F, 3, 4)``, depth maps and field of view in degrees of all frames of a video."""
    if not isinstance(points, Mapping) or points.get("poses") is None or points.get("depths") is None:
        raise DataError(f"{where}: points are a .npz file or both poses and depths of the video's frames")
    if strange := sorted(set(map(str, points)) - {"poses", "depths"}):
        raise DataError(f"{where}: points have poses and depths; these have {strange[0]} besides, which nothing reads")
    cameras, view = read_poses(points["poses"], where=where)
    if len(cameras) != count:
        raise DataError(f"{where}: {len(cameras)} poses for a video of {count} frames; give one for each of its frames")
    if view is None:
        raise DataError(
            f"{where}: points need the cameras' field of view; add fov: [vertical, horizontal] degrees to the poses"
        )
    maps = DepthMaps(points["depths"], where)
    if len(maps) != count:
        raise DataError(
            f"{where}: {len(maps)} depth maps for a video of {count} frames; give one each, null for one that is not known"
        )
    return cameras, maps, view


def _unprojected(
    cameras: np.ndarray, view: tuple[float, float], maps: DepthMaps, taken: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(F, H, W, 3)`` of the frames in the world, and a confidence of 1; NaN where depth or camera is not known."""
    found: list[np.ndarray] = []
    for number in taken:
        depth = maps.read(number)
        if depth is None:
            depth = np.full((1, 1), np.nan, np.float32)
        down, across = tangents(view, (depth.shape[0], depth.shape[1]), maps.where)
        step = max(1, -(-max(depth.shape) // _SIDE))
        rows, columns = (np.arange(step // 2, length, step) for length in depth.shape)
        z = depth[rows][:, columns]
        y = ((rows + 0.5) / depth.shape[0] * 2 - 1)[:, None] * down * z
        x = ((columns + 0.5) / depth.shape[1] * 2 - 1)[None] * across * z
        camera = cameras[number]
        found.append(np.stack([x, y, z], -1) @ camera[:, :3].T + camera[:, 3])
    height, width = max(one.shape[0] for one in found), max(one.shape[1] for one in found)
    points = np.full((len(found), height, width, 3), np.nan, np.float32)
    for laid, one in zip(points, found, strict=True):
        laid[: one.shape[0], : one.shape[1]] = one
    return points, np.ones(points.shape[:3], np.float32)


_kept: dict[str, tuple[int, ...]] = {}
_KEPT = 65536


def _remembered(told: str, make: Any) -> tuple[int, ...]:
    """A choice that was made before from the same files, else a new one, which is kept."""
    key = hashlib.sha256(told.encode()).hexdigest()
    if key in _kept:
        return _kept[key]
    file = _folder() / key[:2] / f"{key}.json"
    numbers: tuple[int, ...] | None = None
    with suppress(OSError, ValueError):
        numbers = tuple(int(number) for number in json.loads(file.read_text(encoding="utf-8")))
    if numbers is None:
        numbers = tuple(make())
        with suppress(OSError):  # a disk that is full or may not be written to costs time only
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as half:
                half.write(json.dumps(numbers).encode())
    if len(_kept) >= _KEPT:
        _kept.clear()
    _kept[key] = numbers
    return numbers


def _folder() -> Path:
    return Path(os.environ.get("MLLM_CACHE", "~/.cache/mllm")).expanduser() / "frames"
