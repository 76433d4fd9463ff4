"""Which chat template renders a conversation, and how do images get their place in it?"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, UnknownName
from mllm.processing.protocol import Processor, TextTokenizer

_FOLDER = Path(__file__).parent / "templates"
_MARK = "{#- mllm: images and escapes -#}"
_BODY = "{#- mllm: the template +#}"
_FLATTENS = "{%- set flat = namespace(messages=[], text='', open=false) -%}"
_FLATTENED = "{%- set messages = flat.messages -%}"
VIDEO = "<video>"
"""A video's place in text that people write. It is no token: the model reads the same placeholder as for pictures."""
_VIDEO_PART = (
    "{%- elif content['type'] in ['video', 'video_url'] -%}{%- set flat.text = flat.text + "
    + repr(VIDEO)
    + " -%}{%- set flat.open = true -%}"
)
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "unk_token",
    "pad_token", "image_token", "raise_exception", "strftime_now", "range", "namespace", "dict",
}  # fmt: skip


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


def with_images(
    template: str,
    image_token: str,
    *,
    escapes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    video: bool = False,
) -> str:
    """The same template, preceded by a pass that turns every message's content into one string.

    An image part becomes the placeholder, with a line break before text that does not begin with white space; a placeholder
    that somebody typed is pulled apart (``<image>`` → ``< image>``), so it never takes an image's slot, and so is each of
    ``escapes``, the tokens by which turns begin and end. No content is no text. options: values of the template's own
    variables (``enable_thinking`` …) where the caller gives none.
    video: video parts become ``<video>``, alike. Because all that lives in the template, transformers,
    training and vLLM apply the same one. Wrapping twice changes nothing. The template sees the placeholder as ``image_token``.
    """
    if template.startswith(_MARK):
        return template
    escapes = [VIDEO, *escapes] if video else escapes
    tokens = list(dict.fromkeys([image_token, *escapes]))
    typed = repr(image_token)
    replaced = "".join(f" | replace({token!r}, {escape_tokens(token, [token])!r})" for token in tokens)
    return (
        _MARK
        + "{#- "
        + json.dumps(tokens)
        + " -#}"
        + "".join(
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
            for name, value in (options or {}).items()
        )
        + _FLATTENS
        + "{%- for message in messages -%}"
        + "{%- if message['content'] is string -%}"
        + "{%- set flat.text = message['content']"
        + replaced
        + " -%}"
        + "{%- elif not message['content'] -%}{%- set flat.text = '' -%}"
        + "{%- else -%}"
        + "{%- set flat.text = '' -%}{%- set flat.open = false -%}"
        + "{%- for content in message['content'] -%}"  # in this form: vLLM looks for it to hand parts over as they are
        + "{%- if content['type'] in ['image', 'image_url'] -%}"
        + "{%- set flat.text = flat.text + "
        + typed
        + " -%}{%- set flat.open = true -%}"
        + (_VIDEO_PART if video else "")
        + "{%- elif content['type'] == 'text' and content['text'] -%}"
        + "{%- set part = content['text']"
        + replaced
        + " -%}"
        + "{%- if flat.open and part[0] not in [' ', '\\n', '\\t'] -%}{%- set flat.text = flat.text + '\\n' -%}{%- endif -%}"
        + "{%- set flat.text = flat.text + part -%}{%- set flat.open = false -%}"
        + "{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- endif -%}"
        + "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}"
        + "{%- endfor -%}"
        + _FLATTENED
        + "{%- set image_token = "
        + typed
        + " -%}"
        + _BODY
        + template
    )


def wrap(
    tokenizer: TextTokenizer,
    template: str,
    image_token: str,
    options: Mapping[str, Any] | None = None,
    *,
    video: bool = False,
) -> str:
    """`with_images` with the escapes of this tokenizer. Raises `ConfigError` for an option that the template does not read."""
    template = unwrapped(template)
    known = template_variables(template) if options else []
    for name in options or {}:
        if name not in known:
            raise ConfigError(
                f"model.template_options: the chat template does not read {name!r}; it reads {', '.join(known) or 'none'}"
            )
    return with_images(template, image_token, escapes=control_tokens(tokenizer, template), options=options, video=video)


def unwrapped(template: str) -> str:
    """What `with_images` was given; a template that it did not make stays as it is."""
    return template.partition(_BODY)[2] if template.startswith(_MARK) and _BODY in template else template


def in_two_steps(template: str) -> tuple[str, str] | None:
    """(a template that writes every message's content as `with_images` makes it, as a JSON list, and one that renders messages whose
    contents were made) of a wrapped template; None for any other."""
    head, _, body = template.partition(_BODY)
    before, flattens, rest = head.partition(_FLATTENS)
    loop, flattened, after = rest.partition(_FLATTENED)
    if not (template.startswith(_MARK) and body and flattens and flattened):
        return None
    contents = before + flattens + loop + "{{- flat.messages | map(attribute='content') | list | tojson -}}"
    return contents, before + after + _BODY + body


def escapes_of(template: Any) -> list[str]:
    """The texts that a wrapped template pulls apart where somebody typed them."""
    found = re.match(re.escape(_MARK) + r"\{#- (\[.*?\]) -#\}", str(template), re.DOTALL)
    return json.loads(found[1]) if found else []


def escape_tokens(text: str, tokens: Sequence[str]) -> str:
    """``text`` with each of ``tokens`` pulled apart after its first character, as a wrapped template does it."""
    for token in tokens:
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


def control_tokens(tokenizer: TextTokenizer, template: str) -> list[str]:
    """Special tokens that the template writes around turns, BOS and EOS: what a user must not be able to type."""
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    ids: set[int] = set()
    for probe in (messages, messages[1:]):
        try:
            text = tokenizer.apply_chat_template(
                probe, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # no system turns, say; what does not render at all is told by `check_template`
            continue
        ids |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    found = [tokenizer.convert_ids_to_tokens(number) for number in sorted(ids & special)]
    return list(dict.fromkeys([*found, *(t for t in (tokenizer.bos_token, tokenizer.eos_token) if t)]))


def template_variables(template: str) -> list[str]:
    """Names that a template reads and that are the caller's to set (``enable_thinking`` …)."""
    from jinja2 import meta
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    return sorted(meta.find_undeclared_variables(environment.parse(plain)) - _GIVEN)


def _literal(value: Any) -> str:
    """A plain value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{str(key)!r}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value) if isinstance(value, str) else json.dumps(value).replace("null", "none")


def check_template(tokenizer: TextTokenizer, template: str) -> None:
    """Raise `ConfigError` when a template drops what is probes, or does not render at all."""
    probes = ["mllm-user-probe", "mllm-assistant-probe", "mllm-second-probe"]
    messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant", "user"], probes)]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        raise ConfigError(
            f"chat_template: does not render ({type(error).__name__}: {error}). Give model.chat_template one of "
            f"{', '.join(shipped_templates())}, or a Jinja file"
        ) from error
    lost = [part for part in probes if part not in text]
    if lost:
        raise ConfigError(
            f"chat_template: {len(lost)} of 3 messages do not appear in the rendered text, so nothing could be learned from "
            f"them. Give model.chat_template one of {', '.join(shipped_templates())}, or a Jinja file"
        )


def for_training(processor: Processor, name: str) -> Any:
    """A processor that shares everything with ``processor`` but renders with another template (shipped name or Jinja file):
    what one training stage reads. The model's ``template_options`` hold here too, as far as this template reads them. Raises
    `ConfigError` when what the assistant says gets lost."""
    text = read_template(name)
    known = template_variables(text) if processor.template_options else []
    options = {key: value for key, value in processor.template_options.items() if key in known}
    video = getattr(processor, "takes_video", False)
    template = wrap(processor.tokenizer, text, processor.image_token, options, video=video)
    probe = "mllm-assistant-probe"
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": probe}]
    text = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    if probe not in text or text.count(processor.image_token) != 1:
        raise ConfigError(f"chat_template {name!r} drops images or what the assistant says; nothing could be learned")
    other: Any = copy.copy(processor)
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
        {
            "role": turn.role,
            "content": parts_of(turn.content, mark) if mark in turn.content else turn.content,
            **({"reasoning_content": turn.thoughts} if turn.thoughts else {}),
            **({"tool_calls": turn.calls} if turn.calls else {}),
            **({"tool_call_id": turn.call_id} if turn.call_id else {}),
            **({"name": turn.name} if turn.name else {}),
        }
        for turn in turns
    ]
