"""What do the parts of a chat message bring: text, a picture, a video, or nothing that a model reads?

One reading for the rows of training and for ``apply_chat_template``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import AlignmentError, DataError
from mllm.types import Video

PICTURES, VIDEOS = ("image", "image_url", "input_image"), ("video", "video_url", "input_video")
PAYLOADS = ("image_url", "image", "video_url", "video", "url", "path", "bytes", "base64")
"""Keys under which a part holds its picture or video."""
_OF_VIDEO = ("fps", "seconds", "start", "end", "numbers", "points")
_TEXTS = ("text", "input_text", "output_text")


def is_visual(part: Any) -> bool:
    """Whether a part is a picture or a video."""
    return isinstance(part, Mapping) and part.get("type") in (*PICTURES, *VIDEOS)


def payload_of(part: Mapping[str, Any], where: str) -> Any:
    """What a picture's or video's part holds; None where it only marks a place. Raises `DataError`."""
    for key in (*PAYLOADS, "frames"):
        value = part.get(key)
        if value is None:
            continue
        if key in ("image_url", "video_url") and isinstance(value, Mapping):
            value = value.get("url")
            if value is None:
                raise DataError(f"{where}: {'an image' if key == 'image_url' else 'a video'}_url part has no url")
        return f"data:image/unknown;base64,{value}" if key == "base64" else value
    return None


def video_of(part: Mapping[str, Any], where: str) -> Video | None:
    """A video's part with what it says beside it; None where it only marks a place. Raises `DataError` for a key that nothing reads."""
    payload = payload_of(part, where)
    beside = {
        key: value for key, value in part.items() if value is not None and key not in ("type", "frames", *PAYLOADS)
    }
    if payload is None and not beside:
        return None
    try:
        if not isinstance(payload, (Video, Mapping)):
            return Video({"frames" if isinstance(payload, (list, tuple)) else "path": payload, **beside})
        if wrong := set(beside) & set(payload if isinstance(payload, Mapping) else _OF_VIDEO):
            raise DataError(f"a video's {min(wrong)} is told twice, in its entry and beside it")
        return Video({**payload, **beside}) if isinstance(payload, Mapping) else payload
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def text_of(part: Any, where: str) -> str:
    """A part's text. Raises `DataError` for one that is no text."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXTS:
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in _TEXTS:
        raise DataError(f"{where}: the text of a part is {type(part.get('text')).__name__}, expected a string")
    raise DataError(f"{where}: content part {kind!r} is not supported; known: text, image, image_url, video, video_url")


def known_parts(messages: Sequence[Any], *, filled: bool) -> list[Any]:
    """Messages whose parts are those that chat templates and transformers read: others would be left out without a word.

    Args:
        messages: of one conversation.
        filled: whether every picture and video has to be there.

    Returns:
        The same messages, with parts ``text``, ``image`` and ``video`` (its value a `Video`) alone.

    Raises:
        DataError: a part of another kind, or a video's key that nothing reads.
        AlignmentError: a part without its picture or video, where they have to be there.
    """
    return [
        {**message, "content": [_known(part, f"message {number}", filled) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple))
        else message
        for number, message in enumerate(messages)
    ]


def _known(part: Any, where: str, filled: bool) -> dict[str, Any]:
    if not is_visual(part):
        return {"type": "text", "text": text_of(part, where)}
    kind = "image" if part["type"] in PICTURES else "video"
    value = payload_of(part, where) if kind == "image" else video_of(part, where)
    if value is None and filled:
        raise AlignmentError(
            f"{where}: a part of type {part['type']!r} holds nothing; give it under {kind}, url, path, bytes or base64, or render with "
            "tokenize=False and give it to the processor beside the text"
        )
    return {"type": kind} if value is None else {"type": kind, kind: value}
