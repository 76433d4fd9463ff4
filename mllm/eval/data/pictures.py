"""Where do a sample's pixels come from, and what is their hash?"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mllm.errors import DataError
from mllm.processing.panels import like, panel_info
from mllm.types import ImageSpec, Video

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """One image, read when needed. source: a file path, the encoded bytes, or a function that returns the bytes."""

    source: Path | bytes | Callable[[], bytes]
    label: str = ""
    """What to call it in messages and reports."""

    def read(self) -> bytes:
        """The encoded bytes as stored. Raises `DataError` when the file cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return self.source.read_bytes() if isinstance(self.source, Path) else self.source()
        except OSError as error:
            raise DataError(f"image {self.label or self.source}: cannot be read ({error})") from None

    def load(self) -> tuple[Image.Image, str]:
        """(RGB image, sha256 of the stored bytes). Raises `DataError` when it does not decode."""
        data = self.read()
        return decode(data, self.label or str(self.source)), hashlib.sha256(data).hexdigest()

    def pixels(self, spec: ImageSpec) -> Tensor:
        """``(3, H, W)`` as one encoder sees it. Raises `DataError`, naming the picture, when it does not decode or has too few panels."""
        from mllm.processing.pixels import to_pixels

        image, _ = self.load()
        try:
            return to_pixels(image, spec)
        except DataError as error:
            raise DataError(f"image {self.label or self.source}: {error}") from None

    def missing(self) -> bool:
        """Whether it is a file that does not exist."""
        return isinstance(self.source, Path) and not self.source.is_file()


@dataclass(frozen=True)
class Frames:
    """Evenly spaced frames of a video file, or of a folder of numbered frame images: the middle of each of ``count``
    equal parts between ``start`` and ``end`` (seconds). ``fps`` is needed for a folder with bounds."""

    path: Path
    count: int
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    def video(self, play: str = "forward", key: str = "") -> Video:
        """The same for a model that chooses frames itself, by its own ``video`` section: ``count`` says nothing there."""
        return Video(self.path, self.fps, self.start, self.end, play=play, key=key)  # type: ignore[arg-type]

    def missing(self) -> bool:
        return not self.path.exists()

    def load(self) -> list[tuple[Image.Image, str]]:
        """(RGB frame, sha256 of its pixels) per frame. Raises `DataError` or, without a video reader,
        `mllm.errors.UnavailableError`."""
        if self.path.is_dir():
            from mllm.processing.videos import frame_files

            files = frame_files(self.path)
            if not files:
                raise DataError(f"video {self.path}: the folder holds no frames")
            if self.fps is None and (self.start is not None or self.end is not None):
                raise DataError(f"video {self.path}: bounds in seconds need the folder's frames per second (fps)")
            return [Picture(files[k]).load() for k in _spread(len(files), self, self.fps or 1.0)]
        images = _decode_video(self)
        return [(image, hashlib.sha256(image.tobytes()).hexdigest()) for image in images]


def decode(data: bytes, label: str) -> Image.Image:
    """An upright RGB image from encoded bytes, as training reads it. Raises `DataError`."""
    from mllm.processing.images import load_image

    return load_image(data, where=f"image {label}")


def picture(value: Any, folder: Path) -> Picture | Frames:
    """A picture from what a row holds: a path (relative to ``folder``), bytes, ``{"bytes", "path"}`` as hub datasets
    store it, a PIL image, or one already made. Raises `DataError`."""
    if isinstance(value, Picture | Frames):
        return replace(value, path=folder / value.path) if isinstance(value, Frames) else value
    if isinstance(value, str | Path | bytes | dict) and value:
        from mllm.references import refer  # as training reads it

        reference = refer(value, where="image", root=folder)
        name = value.get("path") if isinstance(value, dict) else value
        label = str(name) if name and not isinstance(name, bytes) and len(str(name)) < 200 else "image bytes"
        if reference.kind in ("bytes", "file"):
            return Picture(reference.value if reference.kind == "file" else reference.encoded("image"), label)
        raise DataError(f"image {label}: is {reference.kind}; give a file or its bytes")
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG", pnginfo=panel_info(value))
        return Picture(buffer.getvalue(), "image")
    raise DataError(f"an image is a path, bytes or {{bytes, path}}; got {type(value).__name__}")


def from_base64(text: Any) -> bytes:
    """Decoded bytes of base64 text (a data URL's head is dropped). Raises `DataError`."""
    from mllm.references import Reference

    return Reference("bytes", str(text).rpartition(",")[2]).encoded("image")


def blank(image: Image.Image) -> Image.Image:
    """Plain mid-gray in the size of ``image``: what a blind run shows. (The image's own mean colour would tell
    something.)"""
    return like(Image.new("RGB", image.size, (127, 127, 127)), image)


def _spread(available: int, frames: Frames, fps: float) -> list[int]:
    first = 0.0 if frames.start is None else min(frames.start * fps, available - 1.0)
    last = float(available) if frames.end is None else min(frames.end * fps, float(available))
    step = max(last - first, 1.0) / frames.count
    return [min(available - 1, int(first + (k + 0.5) * step)) for k in range(frames.count)]


def _decode_video(frames: Frames) -> list[Image.Image]:
    from mllm.processing.videos import open_video

    clip = open_video(Video(frames.path), where=f"video {frames.path}")
    times = clip.times or [0.0]
    fps = (len(times) - 1) / times[-1] if times[-1] > 0 else 1.0
    wanted = _spread(clip.count, frames, fps)
    numbers = sorted(set(wanted))
    found = dict(zip(numbers, clip.read(numbers), strict=True))
    return [found[number] for number in wanted]
