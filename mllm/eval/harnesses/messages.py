"""How do other harnesses' messages become turns and pictures?"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.data.pictures import Frames
from mllm.eval.data.templates import clean
from mllm.types import IMAGE_MARK, Turn, Video

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


_FRAMES = 8


def frames_for(generator: Any, frames: int | None) -> int | None:
    """How many pictures are taken of a video (default: 8); None for a model that takes videos and chooses their frames itself, as
    training and `mllm eval run` show it. Raises `ConfigError` for such a model and a number."""
    if not getattr(generator, "takes_video", False):
        return _FRAMES if frames is None else int(frames)
    if frames is not None:
        raise ConfigError(
            f"frames={frames}: this model sees videos whole, of which its own config chooses frames (video); leave frames out"
        )
    return None


def interleaved(parts: Iterable[tuple[str, Any]], frames: int | None) -> tuple[str, list[Any]]:
    """(turn content with `IMAGE_MARK`, pictures) of ``("text" | "image" | "video", value)`` parts, in their order.

    A picture and the text after it are separated by a line feed, as in this toolkit's own prompts. frames: pictures
    taken of a video (`frames_for`). Raises `UnavailableError` for parts of another kind.
    """
    content, images = "", []
    for kind, value in parts:
        if kind == "text":
            text = clean(str(value))
            glue = "\n" if content.endswith(IMAGE_MARK) and text and not text.startswith("\n") else ""
            content += glue + text
        elif kind in ("image", "video"):
            found = [picture(value)] if kind == "image" else video(value, frames)
            content += IMAGE_MARK * len(found)
            images.extend(found)
        else:
            raise UnavailableError(f"a message part of type {kind!r}: this model reads text, pictures and videos")
    return content, images


def turns_and_images(messages: Sequence[Mapping[str, Any]], frames: int | None) -> tuple[list[Turn], list[Any]]:
    """Chat messages (``content``: a string, or parts ``{"type": "text" | "image" | "video", …}`` whose value stands
    under ``text`` or ``url``, or under the type's name) as turns and their pictures, in order."""
    turns, images = [], []
    for message in messages:
        content = message["content"]
        parts = [("text", content)] if isinstance(content, str) else [_part(part) for part in content]
        text, found = interleaved(parts, frames)
        turns.append(Turn(message["role"], text))
        images.extend(found)
    return turns, images


def _part(part: Mapping[str, Any]) -> tuple[str, Any]:
    kind = str(part.get("type"))
    for key in ("text",) if kind == "text" else ("url", kind, "value"):
        if key in part:
            return kind, part[key]
    raise DataError(f"a message part of type {kind!r} has no value; its keys: {', '.join(map(str, part))}")


def with_images(text: str, count: int, *, tag: str = "<image>") -> str:
    """A prompt with ``count`` image marks: where ``tag`` stands, when it stands there as often; else in front."""
    text = clean(text)
    if count and text.count(tag) == count:
        return text.replace(tag, IMAGE_MARK)
    return f"{IMAGE_MARK * count}\n{text}" if count else text


def picture(value: Any) -> Image.Image:
    """An RGB picture of a PIL image, encoded bytes, a path, a ``file://`` or a ``data:`` address."""
    from mllm.processing.images import load_image

    if isinstance(value, Mapping):  # a hub dataset's {"bytes", "path"}
        value = value.get("bytes") or value.get("path")
    value = value.getvalue() if isinstance(value, io.BytesIO) else value
    return load_image(value, where=f"picture {value}"[:200] if isinstance(value, str | Path) else "picture")


def video(value: Any, frames: int | None) -> list[Any]:
    """Evenly spaced pictures of a video file or folder of frames; a list of pictures is taken as it is. frames None: one `Video`."""
    from mllm.references import file_path

    if isinstance(value, list | tuple):
        pictures = [picture(entry) for entry in value]
        return [Video(pictures)] if frames is None else pictures
    path = Path(file_path(str(value), "video") if str(value).startswith("file:") else str(value))
    if not path.exists():
        raise DataError(f"{path}: no such video")
    return [Video(path)] if frames is None else [image for image, _ in Frames(path, frames).load()]


def visuals(values: Any, frames: int | None) -> list[Any]:
    """Pictures (with frames None also `Video`s) of what a task calls its visuals: (nested lists of) pictures, picture and video files."""
    if values is None:
        return []
    if isinstance(values, list | tuple):
        return [image for value in values for image in visuals(value, frames)]
    if isinstance(values, str | Path) and Path(values).suffix.lower() not in PICTURE_SUFFIXES:
        return video(values, frames)
    if isinstance(values, Mapping) and "bytes" not in values:
        raise UnavailableError(f"visuals with {', '.join(map(str, values))}: this model reads pictures and videos")
    return [picture(values)]
