"""How do a request's videos reach the engine, so that our own reader and no other chooses their frames?

vLLM decodes a video before a model's processor sees it, and would choose frames by a rule of its own. Here its reader is one that
hands on the file as it is (`FileLoader`); the processor opens it as training does (`mllm.processing.videos`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm.errors import AlignmentError, ConfigError
from mllm.processing.engine_videos import BACKEND, VIDEO_ID, is_packed, pack, packed_bytes
from mllm.processing.protocol import TextTokenizer
from mllm.processing.template import VIDEO
from mllm.types import Video


class FileLoader:
    """vLLM's reader of videos that reads none: the file travels in the shape of frames, and what the server packed as it is."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        made = packed_bytes(data)
        return (pack(Video(data)) if made is None else made), {}


def register_loader() -> None:
    """Make `FileLoader` known to vLLM."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    VIDEO_LOADER_REGISTRY.register(BACKEND)(FileLoader)


def packed(item: Any, metadata: Any) -> np.ndarray:
    """`pack` of what a caller of vLLM gave: packed already, or frames ``(T, H, W, 3)`` whose rate stands in ``metadata``."""
    item = getattr(item, "media", item)
    if isinstance(item, tuple):
        item, metadata = item
    if is_packed(item):
        return item
    return pack(Video(item, fps=metadata.get("fps") if isinstance(metadata, dict) else None))


def mark_videos(tokenizer: TextTokenizer, ids: Sequence[int], image_token: str, image_id: int) -> list[int]:
    """A prompt's ids with one `VIDEO_ID` where each video stands, tokenised around it as around a picture.

    Raises `ConfigError` for ids that are not those of their own text, since the mark could then not be told from the text.
    """
    if VIDEO_ID in ids:
        return list(ids)
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if VIDEO not in text:
        return list(ids)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != list(ids):
        raise ConfigError(
            "the prompt's ids are not those that its text has, so a video's place cannot be found in them; send text or messages"
        )
    order = re.findall("|".join(map(re.escape, (VIDEO, image_token))), text)
    made = list(tokenizer(text.replace(VIDEO, image_token), add_special_tokens=False)["input_ids"])
    places = [place for place, token in enumerate(made) if token == image_id]
    if len(places) != len(order):
        raise AlignmentError(
            f"{len(order)} places of pictures and videos in the text and {len(places)} among its tokens"
        )
    for place, mark in zip(places, order):
        if mark == VIDEO:
            made[place] = VIDEO_ID
    return made
