"""Which chat template renders a conversation, and how do images get their place in it?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, UnknownName

_FOLDER = Path(__file__).parent / "templates"
_MARK = "{#- mllm: images and escapes -#}"


def shipped_templates() -> dict[str, Path]:
    """Name → file of every shipped template."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.jinja"))}


def read_template(name: str) -> str:
    """A template by shipped name or path of a Jinja file."""
    if name in shipped_templates():
        return shipped_templates()[name].read_text(encoding="utf-8").rstrip("\n")
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise UnknownName("chat template", name, shipped_templates())


def with_images(template: str, image_token: str) -> str:
    """The same template, preceded by a pass that turns every message's content into one string.

    An image part becomes the placeholder, with a line break before text that does not begin with white space; a placeholder
    that a user typed is pulled apart (``<image>`` → ``< image>``), so it never takes an image's slot. Because the rule lives
    in the template, transformers, training and vLLM all apply the same one. Wrapping twice changes nothing. The template
    sees the placeholder as ``image_token``.
    """
    if template.startswith(_MARK):
        return template
    typed, harmless = repr(image_token), repr(image_token[:1] + " " + image_token[1:])
    return (
        _MARK
        + "{%- set flat = namespace(messages=[], text='', open=false) -%}"
        + "{%- for message in messages -%}"
        + "{%- if message['content'] is string -%}"
        + "{%- set flat.text = message['content'] | replace("
        + typed
        + ", "
        + harmless
        + ") -%}"
        + "{%- else -%}"
        + "{%- set flat.text = '' -%}{%- set flat.open = false -%}"
        + "{%- for content in message['content'] -%}"
        + "{%- if content['type'] in ['image', 'image_url'] -%}"
        + "{%- set flat.text = flat.text + "
        + typed
        + " -%}{%- set flat.open = true -%}"
        + "{%- elif content['type'] == 'text' and content['text'] -%}"
        + "{%- set part = content['text'] | replace("
        + typed
        + ", "
        + harmless
        + ") -%}"
        + "{%- if flat.open and part[0] not in [' ', '\\n', '\\t'] -%}{%- set flat.text = flat.text + '\\n' -%}{%- endif -%}"
        + "{%- set flat.text = flat.text + part -%}{%- set flat.open = false -%}"
        + "{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- endif -%}"
        + "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}"
        + "{%- endfor -%}"
        + "{%- set messages = flat.messages -%}{%- set image_token = "
        + typed
        + " -%}"
        + template
    )


def check_template(tokenizer: Any, template: str) -> None:
    """Raise `ConfigError` when a template drops what is said, or does not render at all."""
    said = ["mllm-user-probe", "mllm-assistant-probe", "mllm-second-probe"]
    messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant", "user"], said)]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        raise ConfigError(
            f"chat_template: does not render ({type(error).__name__}: {error}). Give model.chat_template one of "
            f"{', '.join(shipped_templates())}, or a Jinja file"
        ) from error
    lost = [part for part in said if part not in text]
    if lost:
        raise ConfigError(
            f"chat_template: {len(lost)} of 3 messages do not appear in the rendered text, so nothing could be learned from "
            f"them. Give model.chat_template one of {', '.join(shipped_templates())}, or a Jinja file"
        )


def for_training(processor: Any, name: str) -> Any:
    """A processor that shares everything with ``processor`` but renders with another template (shipped name or Jinja file):
    what one training stage reads. Raises `ConfigError` when what the assistant says gets lost."""
    template = with_images(read_template(name), processor.image_token)
    probe = "mllm-assistant-probe"
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": probe}]
    text = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    if probe not in text or text.count(processor.image_token) != 1:
        raise ConfigError(f"chat_template {name!r} drops images or what the assistant says; nothing could be learned")
    other = copy.copy(processor)
    other.chat_template = template
    return other


def is_wrapped(template: str | None) -> bool:
    """Whether `with_images` made this template."""
    return bool(template) and str(template).startswith(_MARK)


def parts_of(content: str, mark: str) -> list[dict[str, str]]:
    """Content with image marks as the list of parts that chat templates take."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(content.split(mark)):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def messages_of(turns: Sequence[Any], mark: str) -> list[dict[str, Any]]:
    """Turns (`mllm.types.Turn`) as chat messages."""
    return [
        {"role": turn.role, "content": parts_of(turn.content, mark) if mark in turn.content else turn.content}
        for turn in turns
    ]
