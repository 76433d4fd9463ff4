"""What names the features of a video's frames, and which pixels are they made of?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.processing.frames import VideoSpec
from mllm.processing.images import load_image, read_bytes
from mllm.processing.layout import LayoutRules
from mllm.processing.pixels import to_pixels_multi
from mllm.processing.videos import Seen, frames_of
from mllm.processing.visual_hash import visual_hash
from mllm.types import ImageSpec, Video


def picture_key(image: Any, *, where: str = "image") -> bytes:
    """Hash of a picture's bytes (of its pixels, when it is not a file). Raises `DataError` when it cannot be read."""
    if isinstance(image, (str, bytes, Path)):
        return hashlib.blake2b(read_bytes(image, where=where), digest_size=32).digest()
    picture = load_image(image, where=where)
    head = f"{picture.mode} {picture.size}".encode()
    return hashlib.blake2b(head + picture.tobytes(), digest_size=32).digest()


def film_keys(image: Any, rules: LayoutRules, together: Collection[str], *, where: str) -> dict[str, list[bytes]]:
    """Encoder → the key of each frame that it is given of a video, or of a picture's equal ones; ``together``: encoders in which a
    frame's features hang on all of them.

    Args:
        image: a video or a picture.
        rules: of a model that takes video.
        together: names of encoders.
        where: what an error begins with.

    Returns:
        Keys of 32 bytes, as many as the encoder's rows of pixels.

    Raises:
        DataError: the video cannot be read.
    """
    spec = _spec(rules)
    if isinstance(image, Video):
        numbers: Sequence[int] = _seen(image, rules, where).chosen.numbers
        layout, base = rules.video_layout(len(numbers)), bytes.fromhex(visual_hash(image, where=where))
        given = {name: [numbers[min(k, len(numbers) - 1)] for k in layout.frames_of(name)] for name in rules.images}
    else:
        layout, base = rules.layout(), picture_key(image, where=where)
        given = {name: [0] * layout.rows_of(name) for name in rules.images}
    return {
        name: [
            _named(base, spec.max_pixels, tuple(frames), place)
            if name in together
            else _named(base, spec.max_pixels, number)
            for place, number in enumerate(frames)
        ]
        for name, frames in given.items()
    }


def film_pixels(
    image: Any,
    rules: LayoutRules,
    specs: Mapping[str, ImageSpec],
    *,
    resampler: Any,
    max_pixels: int | None,
    where: str,
) -> dict[str, list[Tensor]]:
    """Encoder → the pixels ``(3, H, W)`` of each frame that `film_keys` names, in its order.

    Args:
        image: a video or a picture.
        rules: of a model that takes video.
        specs: of the encoders.
        resampler: what pictures are scaled with.
        max_pixels: a larger frame is refused.
        where: what an error begins with.

    Returns:
        Lists of tensors.

    Raises:
        DataError: the video or picture cannot be read.
    """
    if not isinstance(image, Video):
        made = to_pixels_multi(load_image(image, where=where, max_pixels=max_pixels), specs, resampler=resampler)
        return {name: [made[name]] * rules.layout().rows_of(name) for name in specs}
    seen = _seen(image, rules, where, max_pixels)
    count = len(seen.chosen.numbers)
    given = {name: rules.video_layout(count).frames_of(name) for name in specs}
    rows = {name: [torch.empty(0)] * len(frames) for name, frames in given.items()}
    for places, picture in seen.pictures():
        made = to_pixels_multi(picture, specs, resampler=resampler)
        for name, frames in given.items():
            for row, frame in enumerate(frames):
                if min(frame, count - 1) in places:
                    rows[name][row] = made[name]
    return rows


def times_of(images: Sequence[Any], rules: LayoutRules) -> Tensor:
    """When each frame of the videos among a sample's images is, as the image processor says it.

    Args:
        images: videos and pictures.
        rules: of a model that takes video.

    Returns:
        ``(images, F)`` milliseconds, -1 beyond a video's frames and for pictures.

    Raises:
        DataError: a video cannot be read.
    """
    times = [
        _seen(one, rules, f"image {k}").chosen.milliseconds if isinstance(one, Video) else []
        for k, one in enumerate(images)
    ]
    longest = max(1, *map(len, times)) if times else 1
    return torch.tensor([row + [-1] * (longest - len(row)) for row in times], dtype=torch.long)


def _spec(rules: LayoutRules) -> VideoSpec:
    assert rules.video is not None
    return rules.video


def _seen(video: Video, rules: LayoutRules, where: str, max_pixels: int | None = None) -> Seen:
    return frames_of(video, _spec(rules), where=where, max_pixels=max_pixels)


def _named(base: bytes, *told: Any) -> bytes:
    return hashlib.blake2b(base + repr(told).encode(), digest_size=32).digest()
