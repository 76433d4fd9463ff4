"""Would a row be learned without the picture that it speaks of?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm.data.cells import given
from mllm.data.conversations import PLACEHOLDER
from mllm.errors import AlignmentError, DataError
from mllm.types import Turn

_PICTURE_NAMES = ("image", "img", "pic", "photo", "pixel", "frame", "file_name")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".tga")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


def refuse_other_media(row: Mapping[str, Any], where: str, read: Sequence[str] = ()) -> None:
    """Raises `DataError` for a row that keeps a video or sound under its usual key: it would be learned without. read: keys that
    are read."""
    for key in _OTHER_MEDIA:
        if key not in read and given(row.get(key)):
            raise DataError(f"{where}: has {key}, which training does not read; give frames as images, or drop the row")


def refuse_blind(
    row: Mapping[str, Any],
    turns: Iterable[Turn],
    *,
    known: Sequence[str],
    where: str,
    keys: Iterable[str] | None = None,
    cure: str = "image_key: {}",
) -> None:
    """Raises `AlignmentError` for a row in which no picture was found although its text holds ``<image>``, or although it
    keeps one under a key that is not read.

    known: keys that pictures are read from; keys: all keys to show, by default the row's; cure: how the declaration names
    another key.
    """
    marks = sum(turn.content.count(PLACEHOLDER) for turn in turns)
    unread = [key for key in row if key not in known and holds_picture(key, row[key])]
    if not marks and not unread:
        return
    shown = ", ".join(map(str, row if keys is None else keys))
    found = f"{marks} {PLACEHOLDER} placeholder{'s' * (marks != 1)} and no image" if marks else "no image"
    name = cure.format(unread[0] if unread else "THE_KEY")
    hint = f"{unread[0]} looks like a picture: declare" if unread else "Declare"
    raise AlignmentError(
        f"{where}: {found}; pictures are read from {' or '.join(known) or 'no column'}, the row has the keys {shown}. "
        f"{hint} {name} in the dataset's YAML, or typed_images: true where {PLACEHOLDER} is text that somebody typed"
    )


def holds_picture(key: str, value: Any) -> bool:
    """Whether a key's name and its value both speak of a picture."""
    if not any(name in str(key).lower() for name in _PICTURE_NAMES):
        return False
    if isinstance(value, (list, tuple)):
        return any(_is_picture(item) for item in value)
    return _is_picture(value)


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(given(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, str):
        return value.startswith("data:image/") or value.lower().partition("?")[0].endswith(_PICTURE_SUFFIXES)
    return isinstance(value, (bytes, bytearray))
