"""How does a video get a file that says where its scene lies? The points of its frames, by an encoder with such a head, beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm.encoders.catalogue import build_encoder, encoder_config, expanded
from mllm.encoders.view_points import READERS, PointReader, SeenViews
from mllm.errors import ConfigError, DataError
from mllm.modes import whole_file
from mllm.processing.known_cameras import POSES
from mllm.processing.pixels import to_pixels
from mllm.processing.scene_points import SIDECAR
from mllm.processing.spread import spread
from mllm.processing.videos import open_video
from mllm.types import Video

DEPTH = ".depth.npy"
"""What the depth maps beside a video are called."""


@dataclass
class PointWriter:
    """Writes files of points.

    Args:
        encoder: one of a type in `READERS` (a preset or a whole config); its layers are those that its head reads, where it says none.
        frames: of a video, evenly from first to last; all of a shorter one.
        size: pixels of a frame's longer side; the other keeps the shape, both in whole patches. None: what the encoder was trained with.
        side: most points along a side that are kept, of a denser map every so many-th; None: all.
        chunk: most frames that see each other at once (`ViewsConfig.chunk`); None: all.
        cameras: write the cameras and depth maps, too, as heads learn from them and encoders of points read them.
        by_rays: Depth Anything 3's cameras from its map of rays in place of its camera decoder.
        device, dtype: of the encoder; the point head computes in float32.
    """

    encoder: str | dict[str, Any] = "vggt-1b"
    frames: int = 128
    size: int | None = None
    side: int | None = 64
    chunk: int | None = None
    by_rays: bool = False
    cameras: bool = False
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    _readers: dict[tuple[int, int], PointReader] = field(default_factory=dict)
    _spec: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = expanded(self.encoder, "encoder")
        kind = spec.get("type")
        if kind not in READERS:
            raise ConfigError(f"encoder: type {kind} has no head that tells points; give one of {', '.join(READERS)}")
        if self.by_rays and kind != "depth_anything_3":
            raise ConfigError(f"by_rays: type {kind} tells no rays; depth_anything_3 does")
        plain = encoder_config({**spec, "layers": [-1]}, where="encoder")
        self._patch = int(getattr(plain, "patch_size"))  # noqa: B009
        self.size = self.size or max(plain.resolved_info.image.height, plain.resolved_info.image.width)
        if self.cameras and READERS[kind].see is PointReader.see:
            raise ConfigError(
                f"cameras: the head of type {kind} that is here tells points alone, no cameras and no depth; take da3-base, "
                "pi3 or mapanything-apache"
            )
        own = {"layers": READERS[kind].layers_read(int(getattr(plain, "depth"))), "keep_prefix": True}  # noqa: B009
        if self.chunk is not None and kind == "depth_anything_3":
            own["reference"] = "first"
        self._spec = {**own, **spec, "chunk": self.chunk}

    def write(self, video: Path, *, where: str) -> tuple[Path, int]:
        """Write ``VIDEO.points.npz``: ``points`` ``(F, h, w, 3)`` float32 as the first frame's camera has them (x right, y down, z forward,
        in a unit of the scene's own), ``confidence`` ``(F, h, w)`` and ``frames`` ``(F,)``. With ``cameras`` also what a row's ``poses``
        and ``depths`` take: ``VIDEO.poses.json`` (matrices camera → first camera, null for frames not looked at, and the field of view) and
        ``VIDEO.depth.npy`` ``(all frames, h, w)`` float16, NaN for those.

        Returns:
            The file, and how many frames it speaks of.

        Raises:
            DataError: the video cannot be read.
            CheckpointError, UnavailableError: the weights cannot.
        """
        clip = open_video(Video(str(video)), where=where)
        numbers = spread(clip.count, min(self.frames, clip.count))
        pictures = clip.read(numbers)  # one after another: not all of them are kept
        first = next(pictures)
        reader = self._reader((first.height, first.width))
        image = reader.encoder.config.resolved_info.image
        pixels = torch.stack([to_pixels(picture, image) for picture in itertools.chain([first], pictures)])
        if self.cameras:
            seen = reader.see(pixels.to(self.device))
            points, confidence = seen.points, seen.confidence.cpu()
        else:
            seen, (points, confidence) = None, reader.read(pixels.to(self.device))
        steps = [max(1, -(-length // self.side)) if self.side else 1 for length in confidence.shape[1:]]
        rows, columns = (slice(step // 2, None, step) for step in steps)
        target = Path(f"{video}{SIDECAR}")
        told: dict[str, Any] = {
            "points": points[:, rows, columns].numpy(),
            "confidence": confidence[:, rows, columns].numpy(),
            "frames": np.array(numbers),
        }
        if seen is not None:
            _write_views(video, seen, numbers, clip.count, seen.depth[:, rows, columns].numpy(), where)
        with whole_file(target) as file:
            np.savez_compressed(file, **told)
        return target, len(numbers)

    def _reader(self, shape: tuple[int, int]) -> PointReader:
        """The reader of frames of a shape ``(height, width)``; all share their weights."""
        size = self._size(shape)
        if size in self._readers:
            return self._readers[size]
        config = encoder_config({**self._spec, "image_size": size}, where="encoder")
        encoder: Any = build_encoder(config)
        reader: PointReader = READERS[config.type](encoder, **({"by_rays": True} if self.by_rays else {}))
        if self._readers:
            first = next(iter(self._readers.values()))
            encoder.load_state_dict(first.encoder.state_dict(), assign=True)
            reader.head = first.head
        else:
            reader.load()
            encoder.to(self.device, self.dtype).eval()
            reader.head.to(self.device).eval()
        self._readers[size] = reader
        return reader

    def _size(self, shape: tuple[int, int]) -> tuple[int, int]:
        assert self.size is not None
        high, wide = (max(1, round(length * self.size / max(shape) / self._patch)) * self._patch for length in shape)
        return high, wide


def _write_views(
    video: Path, seen: SeenViews, numbers: Sequence[int], count: int, depth: np.ndarray, where: str
) -> None:
    """The cameras and depth maps ``(F, h, w)`` of the frames ``numbers``, of ``count``."""
    view = seen.field_of_view
    if not all(np.pi < degrees < 180 for degrees in view):  # below it, a reader takes them for radians
        raise DataError(
            f"{where}: no field of view comes of what the encoder says ({view[0]:g} and {view[1]:g} degrees)"
        )
    matrices: list[Any] = [None] * count
    for number, camera in zip(numbers, seen.cameras.double().numpy(), strict=True):
        matrices[number] = camera.round(7).tolist()
    maps = np.full((count, *depth.shape[1:]), np.nan, np.float16)
    maps[list(numbers)] = np.where(depth > 0, depth, np.nan)
    with whole_file(Path(f"{video}{POSES}")) as file:
        file.write(json.dumps({"matrices": matrices, "fov": [round(degrees, 4) for degrees in view]}).encode())
    with whole_file(Path(f"{video}{DEPTH}")) as file:
        np.save(file, maps)


def write_points(
    writer: PointWriter, videos: Iterable[Path], *, force: bool = False
) -> Iterator[tuple[Path, Path, int | None]]:
    """``(video, its file, frames in it)`` one after another; None for one that had a file and is left as it is unless ``force``."""
    for video in videos:
        target = Path(f"{video}{SIDECAR}")
        whole = [target, *(Path(f"{video}{name}") for name in (POSES, DEPTH) if writer.cameras)]
        if all(path.is_file() for path in whole) and not force:
            yield video, target, None
            continue
        yield video, *writer.write(video, where=str(video))
