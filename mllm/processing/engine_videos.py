"""In what form does a video travel through an inference engine, whose own reader would choose frames by a rule of its own?"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm.errors import DataError
from mllm.processing.images import load_image, read_bytes
from mllm.processing.protocol import Processor
from mllm.processing.videos import frame_files, frames_of, source_of
from mllm.types import Video, scene

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODALITY = "video"
BACKEND = "mllm"
"""Name of our reader among vLLM's readers of videos (``VLLM_VIDEO_LOADER_BACKEND``)."""
VIDEO_ID = -1
"""Stands for a video in a prompt's ids until its tokens are put there; no vocabulary has it."""
_MAGIC = b"\x93mllm-video\n"
_HEADER = len(_MAGIC) + 8


def engine_options(config: PreTrainedConfig, *, images: int | None = None, videos: int | None = None) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: most pictures and videos of a request (None: as many as the context holds), and who reads videos."""
    takes = getattr(config, "video", None) is not None
    limits = {"image": images, **({MODALITY: videos} if takes else {})}
    limits = {kind: count for kind, count in limits.items() if count is not None}
    return {
        **({"limit_mm_per_prompt": limits} if limits else {}),
        **({"media_io_kwargs": {MODALITY: {"video_backend": BACKEND}}} if takes else {}),
    }


def visual_inputs(ids: Sequence[int], visuals: Sequence[Any], processor: Processor, *, where: str) -> dict[str, Any]:
    """A prompt whose ids have one placeholder for each picture and video, in their order, as ``vllm.LLM`` takes it. Raises
    `DataError` for a video that cannot be read."""
    films = [pack(_ready(visual, processor, where), where=where) for visual in visuals if isinstance(visual, Video)]
    data: dict[str, Any] = {"image": [visual for visual in visuals if not isinstance(visual, Video)]}
    if not films:
        return {"multi_modal_data": data}
    made, waiting = list(ids), iter(visuals)
    for place, token in enumerate(made):
        if token == processor.image_token_id and isinstance(next(waiting, None), Video):
            made[place] = VIDEO_ID
    data = {kind: given for kind, given in {**data, MODALITY: films}.items() if given}
    return {"prompt_token_ids": made, "multi_modal_data": data}


def _ready(video: Video, processor: Processor, where: str) -> Video:
    """A video of which all travels that its frames are chosen by: a file and what part of it is meant, or the frames that are seen where it
    is no file (of a folder of thousands, these alone are read), or where points beside it choose them, their numbers."""
    spec = processor.rules.video
    if spec is None or video.frames is not None:
        return video
    source = source_of(video)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        source = frame_files(Path(source))
    if isinstance(source, (list, tuple, np.ndarray)):
        chosen = frames_of(video, spec, where=where).chosen
        shown = [source[number] for number in chosen.numbers]
        files = [read_bytes(item, where=where) if isinstance(item, (str, Path)) else item for item in shown]
        return replace(scene(files, chosen.seconds), play="gray" if video.play == "gray" else "forward")
    if spec.which == "space_aware":
        chosen = frames_of(replace(video, play="forward"), spec, where=where).chosen
        return replace(video, frames=chosen.numbers, start=None, end=None, points=None)
    return video


def pack(video: Video, *, where: str = "video") -> np.ndarray:
    """A video as uint8 ``(1, 1, N, 3)``: its file (or its frames, where it is none) and what part of it is meant. vLLM names caches
    by this array, and takes it apart and together again on its way, so all that an answer depends on is in it. Raises
    `DataError`."""
    source, rate = source_of(video), video.fps
    meant = {name: getattr(video, name) for name in ("start", "end", "frames", "play", "key", "seconds")}
    files = _files(source)
    frames = None if files else _frames(source, where)
    if files:
        content = b"".join(files)
        meant["files"] = [len(file) for file in files]
    elif frames is None:
        content = read_bytes(source, where=where)
    else:
        buffer = io.BytesIO()
        np.save(buffer, frames, allow_pickle=False)
        content = buffer.getvalue()
    head = json.dumps({**meant, "fps": None if rate is None else float(rate), "file": frames is None}).encode()
    body = head + b"\n" + content
    whole = _MAGIC + len(body).to_bytes(8, "little") + body
    return np.frombuffer(whole + bytes(-len(whole) % 3), dtype=np.uint8).reshape(1, 1, -1, 3)


def unpack(array: np.ndarray) -> Video:
    """The video in a packed array."""
    whole = array.tobytes()
    body = whole[_HEADER : _HEADER + int.from_bytes(whole[len(_MAGIC) : _HEADER], "little")]
    head, _, content = body.partition(b"\n")
    attributes = json.loads(head)
    sizes, whole_file = attributes.pop("files", None), attributes.pop("file")
    if sizes:
        ends = np.cumsum(sizes).tolist()
        source: Any = [content[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    else:
        source = content if whole_file else np.load(io.BytesIO(content), allow_pickle=False)
    listed = {name: attributes.pop(name) for name in ("frames", "seconds")}
    return Video(source, **{name: None if row is None else tuple(row) for name, row in listed.items()}, **attributes)


def packed_bytes(data: bytes) -> np.ndarray | None:
    """The array of `pack` in its bytes; None for the bytes of any video's file."""
    if not data.startswith(_MAGIC):
        return None
    return np.frombuffer(data, dtype=np.uint8).reshape(1, 1, -1, 3)


def is_packed(array: Any) -> bool:
    """Whether `pack` made an array. Its beginning alone is looked at."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4 or array.shape[:2] != (1, 1):
        return False
    return array[0, 0, : len(_MAGIC)].tobytes().startswith(_MAGIC)


def _files(source: Any) -> list[bytes]:
    """The pictures of a list that are all given as encoded files (a scene's in a request); [] for any other source. They travel as they
    are: decoded, a few large photographs would be hundreds of megabytes."""
    listed = isinstance(source, (list, tuple)) and source and all(isinstance(item, bytes) for item in source)
    return list(source) if listed else []


def _frames(source: Any, where: str) -> np.ndarray | None:
    """The frames of a source that is no file, ``(T, H, W, C)``."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        source = frame_files(Path(source))
    if not isinstance(source, (list, tuple)):
        return None
    pictures = [np.asarray(load_image(frame, where=f"{where}, frame {k}")) for k, frame in enumerate(source)]
    if not pictures:
        raise DataError(f"{where}: the video has no frames")
    first = pictures[0].shape
    for number, picture in enumerate(pictures):
        if picture.shape != first:
            raise DataError(
                f"{where}, frame {number}: is {picture.shape[1]} × {picture.shape[0]}, the first {first[1]} × {first[0]}"
            )
    return np.stack(pictures)
