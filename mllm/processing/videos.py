"""How are the frames of any video read: only those that are seen, each with its exact time?"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import DataError, MissingFile, UnavailableError
from mllm.install import install_hint
from mllm.processing.frames import Chosen, VideoSpec, choose
from mllm.processing.images import MAX_PIXELS, load_image
from mllm.processing.turned_frames import upright
from mllm.references import natural_order, refer
from mllm.types import Video

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_ANIMATIONS = (b"GIF8", b"RIFF", b"\x89PNG")
_ARRAY = b"\x93NUMPY"
# Containers that hold their own frames. FFmpeg would also open playlists, which name other files and addresses: a file in a data set
# or a request must not make us read those.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,gif,m4v,h264,hevc,ivf,nut,mjpeg,wav,mp3,flac,aac"
)
_MAX_FRAMES = 2_000_000
"""More frames than any video within ``max_seconds`` has: a header that lies is not followed for ever."""
_RATES_ALIKE = 0.05
"""Share by which a rate that is given may differ from the one that a file's own times make."""
_NAMELESS = "\0"
"""Stands for the name of a sample in the errors of what many samples share."""


@dataclass
class Clip:
    """A video that was opened, none of its frames decoded.

    count: frames it has; times: seconds of each from the first on, None where nothing tells; keyframes: numbers of those stored
    whole; read: numbers in ascending order → their RGB pictures, one after another (never all in memory); decoded: frames that
    the last ``read`` had to decode for it.
    """

    count: int
    times: Sequence[float] | None
    read: Callable[[Sequence[int]], Iterator[Image.Image]]
    keyframes: Sequence[int] = ()
    decoded: int = 0


def frames_of(video: Video, spec: VideoSpec, *, where: str, max_pixels: int | None = MAX_PIXELS) -> Seen:
    """What is seen of a video. Raises `DataError` that opens with ``where`` for what cannot be read."""
    clip = open_video(video, where=where, max_pixels=max_pixels, max_seconds=spec.max_seconds)
    chosen = choose(spec, video, clip.count, clip.times, keyframes=clip.keyframes, where=where)
    return Seen(clip, chosen, spec, video.play)


@dataclass
class Seen:
    """The chosen frames of an opened video."""

    clip: Clip
    chosen: Chosen
    spec: VideoSpec
    play: str = "forward"

    def frame_size(self) -> tuple[int, int]:
        """(height, width) of the frames, upright; decodes one of them."""
        (first,) = self.clip.read([min(self.chosen.numbers)])
        return first.height, first.width

    def pictures(self) -> Iterator[tuple[list[int], Image.Image]]:
        """Every different frame once, in the order of the file, with the places at which it is shown."""
        places: dict[int, list[int]] = {}
        for place, number in enumerate(self.chosen.numbers):
            places.setdefault(number, []).append(place)
        numbers = sorted(places)
        if self.play == "gray":
            (first,) = self.clip.read(numbers[:1])
            yield (
                [place for number in numbers for place in places[number]],
                Image.new("RGB", first.size, (127, 127, 127)),
            )
            return
        for number, picture in zip(numbers, self.clip.read(numbers), strict=True):
            yield places[number], _within(picture, self.spec.max_pixels)


def named(video: Video) -> str:
    """A video in a message: its file or address where it has one."""
    place = str(video.source) if isinstance(video.source, (str, Path)) else ""
    return f"video {place!r}" if place and not place.startswith("data:") else "a video"


def open_video(
    video: Video, *, where: str, max_pixels: int | None = MAX_PIXELS, max_seconds: float = float("inf")
) -> Clip:
    """A video from whatever source (see `Video`). Raises `DataError`, `MissingFile`."""
    clip = _open(video, where, max_pixels, max_seconds)
    if video.fps is not None and clip.times and clip.times[-1] > 0:
        rate = (clip.count - 1) / clip.times[-1]
        if abs(rate / video.fps - 1) > _RATES_ALIKE:
            raise DataError(
                f"{where}: fps is {video.fps:g}, and the video tells its own times ({rate:.4g} frames a second); leave fps out: which of "
                "them are seen, the model's video section says"
            )
    if video.seconds is not None:
        clip.times = _given_times(video.seconds, clip, where)
    if (
        clip.times and clip.times[-1] > max_seconds
    ):  # animations and frames with a rate; a container's index ends there itself
        raise DataError(
            f"{where}: lasts {_clock(clip.times[-1])}, more than max_seconds allows ({_clock(max_seconds)})"
        )
    return clip


def _given_times(seconds: Sequence[float], clip: Clip, where: str) -> list[float]:
    """When each frame is, as whoever gave the video says. Raises `DataError` where the video itself says it, or the times cannot be."""
    if clip.times is not None:
        raise DataError(f"{where}: seconds are given, and the video tells its own times; leave seconds (or fps) out")
    times = [float(time) for time in seconds]
    if len(times) != clip.count:
        raise DataError(f"{where}: {len(times)} seconds for {clip.count} frames")
    if not all(0 <= time < math.inf for time in times) or times != sorted(times):
        raise DataError(f"{where}: seconds are {times[:8]}, expected times from 0 on, none before the one before it")
    return times


def source_of(video: Video) -> Any:
    """What a video is read from, as an array where it was a tensor."""
    source = video.source
    if not (hasattr(source, "numpy") and hasattr(source, "detach")):
        return source
    source = source.detach().cpu()
    array = (source.float() if source.is_floating_point() else source).numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 and array.shape[1] == 3 != array.shape[3] else array


def _open(video: Video, where: str, max_pixels: int | None, max_seconds: float) -> Clip:
    source, fps = source_of(video), video.fps
    if isinstance(source, np.ndarray):
        return _of_pictures(_checked_array(source, where), fps, where, max_pixels)
    if isinstance(source, (list, tuple)):
        return _of_pictures(list(source), fps, where, max_pixels)
    reference = refer(source, where=where)
    if reference.kind == "remote":
        raise MissingFile(f"{where}: {str(reference.value)[:200]!r} is remote; download it and give the local path")
    if reference.kind == "bytes":
        return _of_data(reference.encoded(where), fps, where, max_pixels, max_seconds)
    if reference.kind != "file":
        raise DataError(
            f"{where}: {type(source).__name__} is no video; give a file, its bytes, a folder of frames, or a list"
        )
    path: Path = reference.value
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise DataError(f"{where}: folder {str(path)!r} holds no frames ({', '.join(PICTURE_SUFFIXES)})")
        return _of_pictures(files, fps, where, max_pixels)
    if not path.is_file():
        raise MissingFile(f"{where}: no such video file or folder of frames: {str(path)!r}")
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        raise DataError(f"{where}: {str(path)!r} is empty (0 bytes)")
    stat = path.stat()
    try:
        if head.startswith(_ARRAY):
            frames = _frames_of_file(str(path), stat.st_mtime_ns, stat.st_size)
            return _of_pictures(frames, fps, where, max_pixels)
        if _is_animation(head):
            times = _animation_times_of_file(str(path), stat.st_mtime_ns, stat.st_size)
            return _of_animation(str(path), times, where, max_pixels)
        index = _index_of_file(str(path), stat.st_mtime_ns, stat.st_size, max_seconds)
    except DataError as error:
        raise DataError(str(error).replace(_NAMELESS, where, 1)) from error
    return _of_container(str(path), index, where, max_pixels)


def _checked_array(frames: np.ndarray, where: str) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[3] not in (1, 3, 4):
        raise DataError(f"{where}: an array of shape {frames.shape} is no video; expected (T, H, W, 1|3|4)")
    return frames


def _array_of_bytes(data: bytes, where: str) -> np.ndarray:
    """The array of a ``.npy`` file in memory. What its header says is checked before memory is taken for it."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, kind = header(file)
        if kind.hasobject or math.prod(shape) * kind.itemsize != len(data) - file.tell():
            raise ValueError(f"its header speaks of {shape} of {kind}, and {len(data) - file.tell():,} bytes follow")
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape, order="F" if by_column else "C")
    except ValueError as error:
        raise DataError(f"{where}: the array of frames is broken ({_reason(error)})") from error


@lru_cache(maxsize=8)
def _frames_of_file(path: str, changed: int, size: int) -> np.ndarray:
    """The frames of a ``.npy`` file ``(T, H, W, 1 | 3 | 4)``, none of them read; opened once for its tokens and its pixels."""
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header that lies about the file's length, or an array of Python objects
        raise DataError(f"{_NAMELESS}: {path!r} holds no array of frames ({_reason(error)})") from error
    return _checked_array(frames, _NAMELESS).view(np.ndarray)


def _of_data(data: bytes, fps: float | None, where: str, max_pixels: int | None, max_seconds: float) -> Clip:
    if not data:
        raise DataError(f"{where}: the video is empty (0 bytes)")
    if data.startswith(_ARRAY):
        return _of_pictures(_checked_array(_array_of_bytes(data, where), where), fps, where, max_pixels)
    if _is_animation(data[:12]):
        return _of_animation(data, _animation_times(data, where), where, max_pixels)
    return _of_container(data, _index(data, max_seconds, where), where, max_pixels)


def _is_animation(head: bytes) -> bool:
    return head.startswith(_ANIMATIONS) and not (head.startswith(b"RIFF") and head[8:12] != b"WEBP")


def _of_pictures(sources: Sequence[Any] | np.ndarray, fps: float | None, where: str, max_pixels: int | None) -> Clip:
    """Frames that are pictures of their own. All must be of one size: a folder of unlike ones is no video."""
    if not len(sources):
        raise DataError(f"{where}: the video has no frames")
    if len(sources) > _MAX_FRAMES:
        raise DataError(f"{where}: {len(sources):,} frames; at most {_MAX_FRAMES:,} are read")
    if fps is not None and not fps > 0:
        raise DataError(f"{where}: fps is {fps}, expected more than 0")

    def read(numbers: Sequence[int]) -> Iterator[Image.Image]:
        size = None
        for number in numbers:
            picture = load_image(sources[number], where=f"{where}, frame {number}", max_pixels=max_pixels)
            if size not in (None, picture.size):
                raise DataError(
                    f"{where}, frame {number}: is {picture.width} × {picture.height}, the first {size[0]} × {size[1]}"
                )
            size = picture.size
            clip.decoded += 1
            yield picture

    clip = Clip(len(sources), None if fps is None else [k / fps for k in range(len(sources))], read)
    return clip


def _of_animation(source: str | bytes, times: Sequence[float], where: str, max_pixels: int | None) -> Clip:
    """GIF, WebP or APNG, each frame laid over those before it."""

    def read(numbers: Sequence[int]) -> Iterator[Image.Image]:
        with _animation(source, where) as image:
            for number in numbers:
                try:
                    image.seek(number)
                    frame = image.convert("RGBA" if "transparency" in image.info or image.mode == "RGBA" else "RGB")
                except Exception as error:
                    raise DataError(f"{where}, frame {number}: does not decode ({error})") from error
                frame.info.clear()
                clip.decoded += 1
                yield load_image(frame, where=f"{where}, frame {number}", max_pixels=max_pixels)

    clip = Clip(len(times), times, read, keyframes=(0,))
    return clip


def _animation(source: str | bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # decoders of foreign files raise whatever they like
        raise DataError(f"{where}: the animation does not decode ({error})") from error


def _animation_times(source: str | bytes, where: str) -> tuple[float, ...]:
    """When each frame begins, in seconds; one without a duration of its own stands for 0.1 s, as browsers show it."""
    times, now = [], 0.0
    try:
        with _animation(source, where) as image:
            for number in range(min(getattr(image, "n_frames", 1), _MAX_FRAMES)):
                image.seek(number)
                times.append(now)
                now += (float(image.info.get("duration") or 0) or 100.0) / 1000
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: the animation does not decode ({error})") from error
    return tuple(times)


@lru_cache(maxsize=4096)
def _animation_times_of_file(path: str, changed: int, size: int) -> tuple[float, ...]:
    """`_animation_times` of a file, read once for its tokens and its pixels."""
    return _animation_times(path, _NAMELESS)


@dataclass(frozen=True)
class _Index:
    """Every frame's own time stamp, ascending, in units of ``base`` seconds; which are stored whole."""

    stamps: tuple[int, ...]
    keys: tuple[int, ...]
    base: float


@lru_cache(maxsize=256)
def _index_of_file(path: str, changed: int, size: int, max_seconds: float) -> _Index:
    """`_index` of a file, read once for its tokens and its pixels."""
    return _index(path, max_seconds, _NAMELESS)


def _index(source: str | bytes, max_seconds: float, where: str) -> _Index:
    """The time of every frame, from the packets' headers: nothing is decoded. Exact for variable frame rates too."""
    import_av()
    with _opened(source, where) as container:
        stream = _stream(container, where)
        base = float(stream.time_base or 0) or 1.0
        seconds = max(float(container.duration or 0) / 1e6, float(stream.duration or 0) * base)
        if seconds > max_seconds:
            raise DataError(f"{where}: lasts {_clock(seconds)}, more than max_seconds allows ({_clock(max_seconds)})")
        stamps, keys = set(), set()
        first: int | None = None
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is None:
                    raise DataError(
                        f"{where}: packets without times (a raw stream?); put it into a container, e.g. mp4"
                    )
                stamps.add(stamp)
                if packet.is_keyframe:
                    keys.add(stamp)
                first = stamp if first is None else first
                if len(stamps) > _MAX_FRAMES or (stamp - first) * base > max_seconds:
                    raise DataError(
                        f"{where}: lasts more than max_seconds allows ({_clock(max_seconds)}), whatever its header says"
                    )
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: the video's index is broken ({_reason(error)})") from error
    if not stamps:
        raise DataError(f"{where}: the video has no frames")
    return _Index(tuple(sorted(stamps)), tuple(sorted(keys)), base)


def _of_container(source: str | bytes, index: _Index, where: str, max_pixels: int | None) -> Clip:
    first = index.stamps[0]
    numbers = {stamp: number for number, stamp in enumerate(index.stamps)}

    def read(wanted: Sequence[int]) -> Iterator[Image.Image]:
        clip.decoded = 0
        targets = [index.stamps[number] for number in wanted]
        with _opened(source, where) as container:
            for number, frame in zip(wanted, _decode(container, targets, index, clip, where), strict=True):
                yield upright(frame, f"{where}, frame {number}", max_pixels)

    clip = Clip(
        len(index.stamps),
        [(stamp - first) * index.base for stamp in index.stamps],
        read,
        keyframes=[numbers[key] for key in index.keys],
    )
    return clip


def _decode(container: Any, targets: Sequence[int], index: _Index, clip: Clip, where: str) -> Iterator[Any]:
    """The frame of every time stamp, ascending: from the last key frame before it, or on from where decoding stands."""
    stream = _stream(container, where)
    frames: Iterator[Any] = iter(())
    at: int | None = None
    for target in targets:
        place = bisect.bisect_right(index.keys, target) - 1
        key = index.keys[place] if place >= 0 else index.stamps[0]
        try:
            if at is None or key > at:
                container.seek(key, stream=stream, backward=True)
                frames = container.decode(stream)
            found = _forward(frames, target, clip)
            if found is None or found.pts != target:  # a file that cannot be entered there is read from its start
                container.seek(index.stamps[0], stream=stream, backward=True)
                frames = container.decode(stream)
                found = _forward(frames, target, clip)
        except Exception as error:
            raise DataError(f"{where}: frame {_number(index, target)} does not decode ({_reason(error)})") from error
        if found is None or found.pts != target:
            raise DataError(f"{where}: frame {_number(index, target)} is in the file's index and does not decode")
        if found.is_corrupt:
            raise DataError(
                f"{where}: frame {_number(index, target)} is damaged in the file, and what its decoder shows there is made up"
            )
        at = target
        yield found


def _forward(frames: Iterator[Any], target: int, clip: Clip) -> Any:
    for frame in frames:
        clip.decoded += 1
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is not None and stamp >= target:
            return frame
    return None


def _number(index: _Index, stamp: int) -> str:
    number = bisect.bisect_left(index.stamps, stamp)
    return f"{number} ({(stamp - index.stamps[0]) * index.base:.3f} s)"


def _within(picture: Image.Image, most: int | None) -> Image.Image:
    if most is None or picture.width * picture.height <= most:
        return picture
    scale = (most / (picture.width * picture.height)) ** 0.5
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def frame_files(folder: Path) -> list[Path]:
    """A folder's frames in the order of their numbers."""
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES), key=natural_order)


def import_av() -> Any:
    """PyAV. Raises `UnavailableError` saying what to install."""
    try:
        import av
    except ImportError:
        raise UnavailableError(f"video files need PyAV: {install_hint('video')} (folders of frames do not)") from None
    return av


def _opened(source: str | bytes, where: str) -> Any:
    av = import_av()
    av.logging.set_level(None)  # broken files are told once, by us
    try:
        place = io.BytesIO(source) if isinstance(source, bytes) else source
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        return av.open(place, metadata_errors="ignore", container_options=options)
    except Exception as error:
        raise DataError(f"{where}: is no video that can be opened ({_reason(error)})") from error


_OTHERS = ("audio", "subtitles", "data", "attachments")
"""Kinds of streams without pictures. A stream is not asked for its own: PyAV crashes the process over one that FFmpeg does not know."""
_COVER = 1024
"""Of a stream's disposition (FFmpeg's ``attached_pic``): a still picture beside sound or a film."""


def _stream(container: Any, where: str) -> Any:
    """The first stream of pictures that is no cover of a record."""
    shown = [stream for stream in container.streams.video if not stream.disposition.value & _COVER]
    if not shown:
        kinds = [kind for kind in _OTHERS if getattr(container.streams, kind)] or ["nothing that is known"]
        cover = " and a cover" if container.streams.video else ""
        raise DataError(f"{where}: has no pictures, only {', '.join(kinds)}{cover}")
    if shown[0].codec_context is None:  # PyAV would crash the process
        raise DataError(
            f"{where}: nothing here decodes its pictures: their codec is unknown, or its name is damaged; convert it, e.g. to H.264 in mp4"
        )
    return shown[0]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
