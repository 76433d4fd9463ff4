"""Where do videos stand among a prompt's pictures, and what is written before their frames?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mllm.errors import AlignmentError, ConfigError
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.protocol import Processor
from mllm.processing.template import VIDEO
from mllm.types import Video, VisualLayout


def join_videos(text: Any, images: Any, videos: Any, image_token: str, *, takes: bool) -> tuple[Any, list[list[Any]]]:
    """(text, visuals of every text): each `VIDEO` becomes the image's placeholder, and its video stands among the images, in the
    order of the text.

    videos: one, a flat list, or a list of lists, one a text. takes: whether the model takes video. Raises `ConfigError` where it
    does not, `AlignmentError` where marks and videos differ in number.
    """
    if not takes:
        raise ConfigError("videos: this model takes none, its config has no video section (model.video: {frames: 16})")
    texts = [text] if isinstance(text, str) else list(text or [])
    if not texts:
        raise AlignmentError(f"videos without text; give text with {VIDEO} where each stands")
    waiting = {VIDEO: _rows(videos, len(texts), _is_one_video), image_token: _rows(images, len(texts), lambda _: False)}
    mark = re.compile("|".join(map(re.escape, waiting)))
    joined = []
    for number, prompt in enumerate(texts):
        row: list[Any] = []
        for found in mark.findall(prompt):
            queue = waiting[found][number] if len(waiting[found]) > 1 else waiting[found][0]
            if not queue:
                raise AlignmentError(f"text {number} has more {found} placeholders than there are {_kind(found)}")
            visual = queue.pop(0)
            row.append(visual if found != VIDEO or isinstance(visual, Video) else Video(visual))
        joined.append(row)
    for token, queues in waiting.items():
        if left := sum(map(len, queues)):
            raise AlignmentError(f"{left} {_kind(token)} more than {token} placeholders in the text")
    replaced = [prompt.replace(VIDEO, image_token) for prompt in texts]
    return replaced[0] if isinstance(text, str) else replaced, joined


def _kind(token: str) -> str:
    return "videos" if token == VIDEO else "images"


def _rows(values: Any, texts: int, is_one: Any) -> list[list[Any]]:
    """Visuals as one list for each text, or as one list for all."""
    if values is None:
        return [[]]
    if not isinstance(values, (list, tuple)) or is_one(values):
        return [[values]]
    if len(values) == texts and all(isinstance(value, (list, tuple)) and not is_one(value) for value in values):
        rows = [list(value) for value in values]
        return rows if texts > 1 else [rows[0]]
    return [list(values)]


def _is_one_video(value: Any) -> bool:
    """Whether a list is the frames of one video: pictures, not files of videos."""
    return bool(value) and all(hasattr(item, "getexif") or getattr(item, "ndim", 0) in (2, 3) for item in value)


def marks_video(text: Any) -> bool:
    """Whether a video has its place in some of the texts (chat templates pull a typed mark apart)."""
    texts = text if isinstance(text, (list, tuple)) else [text]
    return any(isinstance(prompt, str) and VIDEO in prompt for prompt in texts)


def layout_in_call(rules: LayoutRules, inputs: Any, number: int) -> VisualLayout:
    """The tokens of visual ``number`` of a processor's call, without the text before frames."""
    sizes, times = inputs.get(IMAGE_SIZES), inputs.get(VIDEO_TIMES)
    frames = 0 if times is None else sum(int(time) >= 0 for time in times[number])
    if frames:
        return rules.video_layout(frames)
    return rules.layout() if sizes is None else rules.layouts([sizes[number]])[0]


def stamped(processor: Processor, inputs: Any, number: int) -> VisualLayout | None:
    """The tokens of visual ``number`` with the text before its frames; None for a picture."""
    times = [int(time) for time in inputs[VIDEO_TIMES][number] if int(time) >= 0]
    return processor.rules.timed_layout(times, processor.write) if times else None


def write_stamps(processor: Processor, batch: Any) -> None:
    """Put the tokens of the text before frames into ``input_ids``, where room was left for them: tokenised by itself, as in
    training, and not together with what stands beside it."""
    spec = processor.rules.video
    if spec is None or spec.stamp is None:
        return
    number, total = 0, len(batch[VIDEO_TIMES])
    for row in batch["input_ids"]:
        places = [k for k, token in enumerate(row) if int(token) == processor.image_token_id]
        used = 0
        while used < len(places) and number < total:
            layout = stamped(processor, batch, number)
            number += 1
            if layout is None:
                used += layout_in_call(processor.rules, batch, number - 1).num_placeholders
                continue
            for offset, token in layout.literals:
                if used + offset < len(places):  # a tokenizer that truncates may have cut the rest
                    row[places[used + offset]] = token
            used += layout.num_tokens


def flat_visuals(images: Any) -> Sequence[Any]:
    """All visuals of nested lists, in order."""
    return [v for image in images for v in flat_visuals(image)] if isinstance(images, (list, tuple)) else [images]
