"""How do the conversation formats in use become turns with image marks?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm.data.tools import beside_content
from mllm.errors import AlignmentError, DataError
from mllm.processing.message_parts import PAYLOADS, VIDEOS, is_visual, payload_of, text_of, video_of
from mllm.types import IMAGE_MARK, Turn, Video

PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
_MARKS = re.compile(f"{VIDEO_PLACEHOLDER}|{PLACEHOLDER}")
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def role_of(name: Any, where: str) -> Any:
    """``user``, ``assistant``, ``system`` or ``tool``. Raises `DataError` naming the sample."""
    role = _ROLES.get(name.strip(" _:").lower()) if isinstance(name, str) else None  # `_user`, `USER:`
    if role is None:
        raise DataError(f"{where}: unknown role {name!r}; known: {', '.join(_ROLES)}")
    return role


def plain_text(text: str) -> str:
    """User text with the object replacement character taken out, so that it cannot hold an `IMAGE_MARK`."""
    return text.replace("\ufffc", "") if "\ufffc" in text else text


def picture_messages(image: str, exchanges: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """(question, answer) pairs about one picture, as a row's ``messages``; the first question shows the picture."""
    messages: list[dict[str, Any]] = []
    for question, answer in exchanges:
        content: Any = question
        if not messages:
            content = [{"type": "image", "image": image}, {"type": "text", "text": "\n" + question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def placeholder_turns(entries: Sequence[Any], num_images: int, *, where: str, image_first: bool = False) -> list[Turn]:
    """Turns of a LLaVA or ShareGPT conversation, where ``<image>`` in the text marks an image.

    Without images it is text like any other. With images, the user's placeholders are the marks if their number fits,
    else everybody's are; if neither fits, `AlignmentError`. Leading assistant turns are dropped (ShareGPT has some;
    chat templates and LLaVA's own training refuse them). image_first: every turn's marks go before its text.
    """
    turns = []
    for entry in _entries(entries, where):
        speaker, text = (
            entry.get(first, entry.get(second)) for first, second in (("from", "role"), ("value", "content"))
        )
        role = role_of(speaker, where)
        more = beside_content(entry, role, where)
        text = "" if text is None and more.get("calls") else text
        if not isinstance(text, str):
            raise DataError(f"{where}: a turn's text is {type(text).__name__}, expected a string")
        turns.append(Turn(role, plain_text(text), _learn(entry, where), **more))
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    while first < len(turns) and turns[first].role == "assistant":
        del turns[first]
    if not num_images:
        return turns
    if has_exchanges(entries):
        return show_first(turns, num_images, where=where)
    return mark_placeholders(turns, num_images, where=where, image_first=image_first)


def mark_placeholders(turns: list[Turn], num_images: int, *, where: str, image_first: bool = False) -> list[Turn]:
    """Replace ``<image>`` by `IMAGE_MARK`, in user turns or in all, whichever number fits. Raises `AlignmentError`."""
    counts = [turn.content.count(PLACEHOLDER) for turn in turns]
    by_user = sum(count for turn, count in zip(turns, counts) if turn.role == "user")
    if by_user == num_images:
        roles = {"user"}
    elif sum(counts) == num_images:
        roles = {"user", "assistant", "system"}
    else:
        raise AlignmentError(
            f"{where}: {sum(counts)} {PLACEHOLDER} placeholders ({by_user} of the user) and {num_images} images; each needs one: "
            f"mend the row, or where {PLACEHOLDER} is text that somebody typed, mark the images by parts ({{'type': 'image'}})"
        )
    for turn, count in zip(turns, counts):
        if turn.role not in roles or not count:
            continue
        if image_first:
            rest = turn.content.replace(PLACEHOLDER, "").strip()
            turn.content = (IMAGE_MARK + "\n") * count + rest
        else:
            turn.content = turn.content.replace(PLACEHOLDER, IMAGE_MARK)
    return turns


def of_preferences(keys: Iterable[Any]) -> str:
    """What to do with rows that hold two answers and no conversation, as DPO's do; empty for others."""
    if not {"chosen", "rejected"} <= set(keys):
        return ""
    return (
        ". A chosen and a rejected answer are for a stage of kind: dpo; write a row as messages, the prompt with the chosen answer as the "
        "last turn, and the other answer's text under rejected"
    )


def has_exchanges(entries: Any) -> bool:
    """Whether entries are questions with their answers, ``{"user", "assistant"}``, as The Cauldron's and FineVision's
    ``texts`` are."""
    return isinstance(entries, Sequence) and bool(entries) and all(map(_is_exchange, entries))


def show_first(turns: list[Turn], num_images: int, *, where: str) -> list[Turn]:
    """The images before the first question, for data sets that mark no places; typed marks are obeyed where there are
    some."""
    if any(PLACEHOLDER in turn.content for turn in turns):
        return mark_placeholders(turns, num_images, where=where)
    first = next((turn for turn in turns if turn.role == "user"), None)
    if first is None:
        raise AlignmentError(f"{where}: {num_images} images and no question to show them with")
    first.content = (IMAGE_MARK + "\n") * num_images + first.content
    return turns


def place_videos(entries: Any, images: Sequence[Any], videos: Sequence[Video], *, where: str) -> tuple[Any, list[Any]]:
    """(conversation, visuals) in which videos stand among the images, in the order of the text: every ``<video>`` that a user says
    becomes ``<image>``.

    Without ``<video>``, ``<image>`` marks the videos of a row that has no images (LLaVA-Video's rows); without either, all are
    shown before the first question. Raises `AlignmentError` when marks and videos differ in number.
    """
    entries = [dict(entry) for entry in _entries(entries, where)]
    places = [
        (entry, key)
        for entry in entries
        if role_of(entry.get("from", entry.get("role")), where) == "user"
        for key in ("value", "content")
        if isinstance(entry.get(key), str)
    ]
    text = " ".join(entry[key] for entry, key in places)
    marks, pictures = text.count(VIDEO_PLACEHOLDER), text.count(PLACEHOLDER)
    if not marks and not images and pictures == len(videos):
        return entries, list(videos)
    if not marks and not pictures and places:
        entry, key = places[0]
        entry[key] = f"{PLACEHOLDER}\n" * (len(images) + len(videos)) + entry[key]
        return entries, [*images, *videos]
    if marks != len(videos) or pictures != len(images):
        raise AlignmentError(
            f"{where}: {marks} {VIDEO_PLACEHOLDER} and {pictures} {PLACEHOLDER} placeholders of the user for {len(videos)} videos "
            f"and {len(images)} images"
        )
    waiting = {VIDEO_PLACEHOLDER: iter(videos), PLACEHOLDER: iter(images)}
    visuals = [next(waiting[mark]) for mark in _MARKS.findall(text)]
    for entry, key in places:
        entry[key] = entry[key].replace(VIDEO_PLACEHOLDER, PLACEHOLDER)
    return entries, visuals


def message_turns(
    messages: Sequence[Any], images: Sequence[Any], *, where: str, videos: Sequence[Video] = ()
) -> tuple[list[Turn], list[Any]]:
    """(turns, images) of OpenAI-style messages, videos among the images as `Video`.

    ``content`` is a string or a list of parts: ``text``, ``image_url``, ``image`` (payload under ``image``,
    ``image_url``, ``url``, ``path`` or ``base64``; without payload, the next of ``images``), ``video`` and ``video_url`` alike
    (the next of ``videos``). If any message has image
    parts, the parts are the marks and a typed ``<image>`` stays text; otherwise ``<image>`` in strings marks the
    entries of ``images``, if there are any. Raises `AlignmentError` when numbers differ.
    """
    entries = _entries(messages, where)
    with_parts = any(
        isinstance(entry.get("content"), list) and any(is_visual(part) for part in entry["content"])
        for entry in entries
    )
    if videos and not with_parts:
        entries, images = place_videos(entries, images, videos, where=where)
    turns: list[Turn] = []
    found: list[Any] = []
    pending, films = list(images), list(videos)
    for entry in entries:
        role = role_of(entry.get("role", entry.get("from")), where)
        more = beside_content(entry, role, where)
        content = entry.get("content", entry.get("value"))
        if isinstance(content, list):
            pieces = []
            for part in content:
                if is_visual(part):
                    film = part["type"] in VIDEOS
                    payload = video_of(part, where) if film else payload_of(part, where)
                    if payload is None:
                        waiting, kind = (films, "video") if film else (pending, "image")
                        if not waiting:
                            count = len(videos if film else images)
                            raise AlignmentError(f"{where}: more {kind} parts than the {count} entries of {kind}s")
                        payload = waiting.pop(0)
                    found.append(payload)
                    pieces.append(IMAGE_MARK)
                else:
                    pieces.append(plain_text(text_of(part, where)))
            content = "".join(pieces)
        elif isinstance(content, str):
            content = plain_text(content)
        elif content is None and role == "assistant" and (more.get("calls") or more.get("thoughts")):
            content = ""
        elif content is None and role == "assistant":
            raise DataError(f"{where}: an assistant message has no content and no tool call")
        else:
            raise DataError(f"{where}: content is {type(content).__name__}, expected a string or a list of parts")
        turns.append(Turn(role, content, _learn(entry, where), **more))
    if with_parts:
        if pending:
            raise AlignmentError(
                f"{where}: {len(found)} image parts, and {len(pending)} of {len(images)} entries of images unused"
            )
        if films:
            raise AlignmentError(f"{where}: {len(films)} of {len(videos)} entries of videos unused")
        return turns, found
    if images:
        place = show_first if has_exchanges(messages) else mark_placeholders
        turns = place(turns, len(images), where=where)
    return turns, list(images)


def embeds_images(messages: Any) -> bool:
    """Whether some image part of OpenAI-style messages brings its own picture."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return False
    contents = (entry.get("content") for entry in messages if isinstance(entry, Mapping))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(is_visual(part) and any(part.get(key) is not None for key in PAYLOADS) for part in parts)


def _entries(entries: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        found = "empty" if entries == [] else type(entries).__name__
        raise DataError(f"{where}: the conversation is {found}, expected a list of turns")
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: a turn is {type(entry).__name__}, expected an object with a role and text")
    return [turn for entry in entries for turn in (_of_exchange(entry) if _is_exchange(entry) else [entry])]


def _is_exchange(entry: Any) -> bool:
    named = ("role", "from", "content", "value")
    return (
        isinstance(entry, Mapping)
        and "user" in entry
        and "assistant" in entry
        and not any(entry.get(k) is not None for k in named)
    )


def _of_exchange(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": entry[role]} for role in ("user", "assistant")]


def _learn(entry: Mapping[str, Any], where: str) -> bool:
    """``learn`` (ours), ``weight`` (OpenAI's and Axolotl's 0 or 1) or ``train``; default True."""
    for key in ("learn", "train", "weight"):
        value = entry.get(key)
        if value is None:
            continue
        if value in (0, 1):
            return bool(value)
        raise DataError(
            f"{where}: {key} is {value!r}, expected true or false (a turn is learned or not, there are no shares)"
        )
    return True
