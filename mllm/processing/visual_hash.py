"""What names a picture or a video by its content?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm.processing.images import image_hash, read_bytes
from mllm.processing.videos import frame_files
from mllm.references import refer
from mllm.types import Video


def visual_hash(visual: Any, *, where: str = "image") -> str:
    """`image_hash` of a picture; of a video over what it is read from and which part of it."""
    if not isinstance(visual, Video):
        return image_hash(visual, where=where)
    play = (visual.play, visual.key) if visual.play == "shuffled" else visual.play
    digest = hashlib.sha256(repr((visual.fps, visual.start, visual.end, visual.frames, play)).encode())
    if visual.seconds is not None:
        digest.update(repr(visual.seconds).encode())
    for part in _told(visual.points):
        digest.update(part)
    for part in _parts(visual.source, where):
        digest.update(part)
    return digest.hexdigest()


def _told(points: Any) -> Iterator[bytes]:
    """The bytes of what tells where a video's scene lies: the names of files, the values of what is in memory."""
    if isinstance(points, Mapping):
        for key in sorted(points):
            yield str(key).encode()
            yield from _told(points[key])
    elif isinstance(points, (list, tuple)) and any(isinstance(item, (Mapping, np.ndarray)) for item in points):
        for item in points:
            yield from _told(item)
    elif isinstance(points, np.ndarray):
        yield repr((points.shape, points.dtype.str)).encode()
        yield np.ascontiguousarray(points).tobytes()
    elif points is not None:
        yield repr(points).encode()


def _parts(source: Any, where: str) -> Iterator[bytes]:
    """The bytes behind a video's source, piece by piece."""
    if isinstance(source, (list, tuple)):
        for item in source:
            yield image_hash(item, where=where).encode()
    elif hasattr(source, "detach"):
        yield from _parts(source.detach().cpu().numpy(), where)
    elif isinstance(source, np.ndarray):
        yield image_hash(source, where=where).encode()
    else:
        reference = refer(source, where=where)
        if reference.kind == "file" and Path(reference.value).is_dir():
            yield from _parts(frame_files(Path(reference.value)), where)
        elif reference.kind == "file" and Path(reference.value).is_file():
            with Path(reference.value).open("rb") as file:
                while piece := file.read(1 << 20):
                    yield piece
        else:
            yield read_bytes(source, where=where)
