"""Which part of a rendered conversation is each assistant turn, from the generation prompt to its end?"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.errors import DataError
from mllm.processing.protocol import Templated, TextProcessor, TextTokenizer
from mllm.processing.template import escape_tokens, escapes_of, in_two_steps, template_variables, unwrapped

IGNORE = -100
_LONG = 6
"""Messages from which on contents are made once for all beginnings of a conversation."""
_THOUGHT_TAGS = re.compile(r"</?think(?:ing)?>")
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, add_generation_prompt) → text."""


@dataclass(frozen=True)
class Reply:
    """What one assistant turn adds to the text. turn: its place among the messages; ``begin`` to ``end``: its characters, from
    the end of the generation prompt to the end of the turn, that end included; prompted: the text before ``begin`` is what
    `generate` is asked for this turn, byte for byte; lead: what the template writes between prompt and answer."""

    turn: int
    begin: int
    end: int
    prompted: bool
    lead: str = ""


def special_ids(tokenizer: TextTokenizer) -> set[int]:
    """Ids of control tokens. ``all_special_ids`` alone leaves out added tokens with ``special=True`` that have no name of
    their own (Phi-3's ``<|end|>``, Gemma's ``<end_of_turn>``)."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class ChatRenderer:
    """A processor's chat template as a function. options: variables of the template."""

    def __init__(self, processor: Templated, tools: Any = None, **options: Any):
        self.processor, self.tools, self.options = processor, tools, options

    def __call__(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return self._by(self.processor.chat_template, messages, add_generation_prompt)

    def of_beginnings(self, messages: Sequence[Mapping[str, Any]], text: str) -> Render:
        """What renders the first so many of these messages, in less time where there are several turns: of a template of ours, what
        takes the time is to bring every message's content into one string, which needs doing once.

        Args:
            messages: the whole conversation.
            text: as it is rendered; what would not give the same is not used.

        Returns:
            A function like this one, for beginnings of ``messages`` alone.
        """
        steps = in_two_steps(str(self.processor.chat_template)) if len(messages) >= _LONG else None
        if steps is None:
            return self
        contents, plain = steps
        try:
            made = json.loads(self._by(contents, messages, False))
            given = [dict(message, content=content) for message, content in zip(messages, made, strict=True)]
            if self._by(plain, given, False) != text:
                return self
        except Exception:  # templates and what they are given refuse in many ways
            return self
        return lambda first, add_generation_prompt: self._by(plain, given[: len(first)], add_generation_prompt)

    def _by(self, template: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.tokenizer.apply_chat_template(
            named_thoughts(messages, template),
            tools=self.tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.options,
        )


def named_thoughts(messages: Sequence[Mapping[str, Any]], template: Any) -> list[dict[str, Any]]:
    """The same messages with ``reasoning_content`` under the name by which the template reads thoughts."""
    found = [dict(message) for message in messages]
    if not any("reasoning_content" in message for message in found):
        return found
    key = next((k for k in _THOUGHT_KEYS if re.search(rf"""(\.|\[['"]|\(['"]){k}\b""", str(template))), None)
    for message in found:
        if "reasoning_content" in message and key not in (None, "reasoning_content"):
            message[key] = message.pop("reasoning_content")
    return found


def find_replies(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    tokens: Sequence[str],
    learn: Sequence[bool] | None = None,
    tools: Any = None,
    where: str,
) -> tuple[str, list[Reply]]:
    """(text, assistant turns in it) of a conversation.

    tokens: texts of the tokenizer's added tokens, one of which may end a turn; learn: for each message whether it will be
    learned. Raises `DataError` where the template refuses the conversation, or loses or rewrites what the assistant says,
    calls or thinks, what a tool answers, or which tools there are.
    """
    try:
        text = render(messages, False)
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {first_line(error)}") from error
    escapes = escapes_of(template)
    _check_tools(render, text, messages, tools, escapes, template, where)
    replies: list[Reply] = []
    cursor = 0
    if isinstance(render, ChatRenderer):
        render = render.of_beginnings(messages, text)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        reply = _find(render, text, messages, index, cursor, tokens, escapes, where)
        thoughts = learn is None or learn[index]
        _check_spoken(text[reply.begin : reply.end], message, escapes, thoughts, f"{where}: turn {index + 1}")
        replies.append(reply)
        cursor = reply.end
    return text, replies


def _find(
    render: Render,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    index: int,
    cursor: int,
    tokens: Sequence[str],
    escapes: Sequence[str],
    where: str,
) -> Reply:
    pieces = spoken_pieces(messages[index], escapes)
    prompt = _attempt(render, messages[:index], True) if index else None
    begin, prompted = None, False
    if prompt is not None and len(prompt) >= cursor and text.startswith(prompt):
        begin, prompted = len(prompt), True
    elif pieces:
        begin = _place(text, prompt or "", pieces, cursor)
    if begin is None:
        raise DataError(
            f"{where}: turn {index + 1}: the chat template does not show where the assistant begins to speak; "
            "labels cannot be placed"
        )
    last = index == len(messages) - 1
    closed = text if last else _attempt(render, messages[: index + 1], False)
    if closed is not None and len(closed) > begin and text.startswith(closed):
        end = _end_of(text, begin, len(closed), _last(text, begin, len(closed), pieces))
    else:
        end = _end_by_token(text, _last(text, begin, len(text), pieces) or begin, closed or "", tokens)
    first = text.find(pieces[0], begin, end) if pieces else end
    return Reply(index, begin, end, prompted, text[begin:first] if pieces and first >= 0 else "")


def _place(text: str, prompt: str, pieces: Sequence[str], cursor: int) -> int | None:
    """Where an answer begins whose generation prompt is not a prefix of the text: where the two part, or soon after."""
    same = next((i for i, (a, b) in enumerate(zip(text, prompt)) if a != b), min(len(text), len(prompt)))
    parted = max(cursor, same)
    for piece in pieces:  # the first may be left out
        for back in range(min(parted - cursor, len(piece)) + 1):  # the answer may begin as the prompt would go on
            if text.startswith(piece, parted - back):
                return parted - back
    found = [place for place in (text.find(piece, parted) for piece in pieces) if place >= 0]
    return min(found, default=None)


def _last(text: str, begin: int, stop: int, pieces: Sequence[str]) -> int | None:
    """Where the last thing said ends, when all is found in order; None where something is missing."""
    place = begin
    for piece in pieces:
        found = text.find(piece, place, stop)
        if found < 0:
            return None
        place = found + len(piece)
    return place


def _end_of(text: str, begin: int, stop: int, last: int | None) -> int:
    """Where a turn ends that is rendered up to ``stop``; last: where the last thing said ends."""
    end = begin + len(text[begin:stop].rstrip())
    return stop if last is not None and last >= end else end  # nothing but white space ends it: that is the end


def _end_by_token(text: str, after: int, closed: str, tokens: Sequence[str]) -> int:
    """Where a turn ends that the template renders otherwise when more follows (Qwen3's thoughts). closed: the conversation that
    ends with it, for the token that does."""
    ends = [token for token in tokens if closed.rstrip().endswith(token)]
    if ends:
        closing = max(ends, key=len)
        found = text.find(closing, after)
        return after if found < 0 else found + len(closing)
    return after


def spoken_pieces(message: Mapping[str, Any], escapes: Sequence[str]) -> list[str]:
    """What of an assistant's message must be found in the text, in order: thoughts, words, places of images (the first of
    ``escapes``)."""
    pieces = [_split_thoughts(str(message[key]), escapes) for key in _THOUGHT_KEYS if message.get(key)]
    content = message.get("content") or ""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") in ("image", "image_url"):
            pieces.append([escapes[0]] if escapes else [])
        else:
            pieces.append(_split_thoughts(part.get("text") or "", escapes))
    return [piece for found in pieces for piece in found]


def _split_thoughts(text: str, escapes: Sequence[str]) -> list[str]:
    return [piece.strip() for piece in _THOUGHT_TAGS.split(escape_tokens(text, escapes)) if piece.strip()]


def _check_spoken(
    region: str, message: Mapping[str, Any], escapes: Sequence[str], with_thoughts: bool, where: str
) -> None:
    """Raise `DataError` unless everything the assistant says stands in its turn."""
    pieces = spoken_pieces(message, escapes)
    content = message.get("content")
    tagged = isinstance(content, str) and "</think" in content
    if not with_thoughts and (tagged or any(message.get(key) for key in _THOUGHT_KEYS)):
        pieces = pieces[-1:]  # templates may leave the thoughts of earlier turns out; this one is not learned
    if _last(region, 0, len(region), pieces) is None:
        answer = spoken_pieces({"content": message.get("content")}, escapes)
        if (tagged or len(answer) < len(pieces)) and answer and answer[-1] in region:
            raise DataError(
                f"{where}: the chat template leaves the assistant's thoughts out. Use a template that renders them; where only "
                "earlier turns lose theirs, give those turns learn: false, or make a sample that ends with each"
            )
        raise DataError(
            f"{where}: the chat template rewrites assistant turns or leaves words out; labels cannot be placed"
        )
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        arguments = function.get("arguments")
        keys = list(arguments) if isinstance(arguments, Mapping) else []
        if any(str(word) not in region for word in (function.get("name"), *keys)):
            raise DataError(
                f"{where}: the chat template has no tool calls (or renders {function.get('name')!r} without its name or "
                "arguments). Use the language model's own template if it has them, or leave such samples out"
            )


def _check_tools(
    render: Render,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    escapes: Sequence[str],
    template: str,
    where: str,
) -> None:
    for tool in tools or []:
        name = (tool.get("function") or tool).get("name") if isinstance(tool, Mapping) else None
        if name is None or str(name) not in text:
            raise DataError(f"{where}: the chat template does not render tools (tool {name!r} is not in the text)")
    results = [(i, m) for i, m in enumerate(messages) if m["role"] == "tool"]
    if not results:
        return
    for index, message in results:
        if any(piece not in text for piece in spoken_pieces({"content": message.get("content")}, escapes)):
            raise DataError(f"{where}: turn {index + 1}: the chat template leaves the tool's result out")
    for role in ("assistant", "user"):
        others = [dict(m, role=role) if m["role"] == "tool" else m for m in messages]
        if _attempt(render, others, False) == text:
            raise DataError(
                f"{where}: the chat template has no tool results: it would show them as the {role}'s words. Use the language "
                "model's own template if it has them, or leave such samples out"
            )


def _attempt(render: Render, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str | None:
    """The text, or None where the template refuses (each in its own way)."""
    try:
        return render(messages, add_generation_prompt)
    except Exception:
        return None


def label_text(
    tokenizer: TextTokenizer,
    text: str,
    replies: Sequence[Reply],
    learn: Sequence[bool],
    *,
    parts: bool = True,
) -> tuple[Tensor, Tensor, list[slice]]:
    """Ids ``(T,)``, labels ``(T,)`` and each reply's tokens. learn: for each reply; parts: where the answer would change the
    last tokens of its prompt, tokenise the text in parts, so that the prompt's tokens are those that `generate` is given."""
    ids, offsets = _tokenise(tokenizer, text, [reply.begin for reply in replies] if parts else [])
    labels = torch.full((len(ids),), IGNORE, dtype=torch.long)
    numbers = torch.tensor(ids, dtype=torch.long)
    places: list[slice] = []
    position = 0
    for reply, learned in zip(replies, learn, strict=True):
        while position < len(ids) and offsets[position][0] < reply.begin:
            position += 1
        start = position
        while position < len(ids) and offsets[position][0] < reply.end:
            position += 1
        places.append(slice(start, position))
        if learned:
            labels[start:position] = numbers[start:position]
    return numbers, labels, places


def _tokenise(tokenizer: TextTokenizer, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of the text; cut in parts after those prompts whose last tokens would be others with the answer behind
    them (a token over the border; GPT-2's pattern, which reads a line break by what follows)."""
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    added, starts = tokenizer.added_tokens_decoder, [start for start, _ in offsets]
    needed = []
    for cut in cuts:
        stop = bisect_left(starts, cut)
        first = next((k for k in range(stop - 1, -1, -1) if ids[k] in added), 0)  # added tokens part the text
        if stop and ids[stop - 1] in added:
            continue
        alone = tokenizer(text[starts[first] : cut], add_special_tokens=False)["input_ids"] if stop else []
        if alone != ids[first:stop]:
            needed.append(cut)
    if not needed:
        return ids, offsets
    anchor = tokenizer.eos_token
    ids, offsets = [], []
    for begin, end in zip([0, *needed], [*needed, len(text)]):
        lead = anchor if begin else ""  # after a special token nothing is put before the first word
        part = tokenizer(lead + text[begin:end], return_offsets_mapping=True, add_special_tokens=False)
        skip = 1 if begin else 0
        ids += part["input_ids"][skip:]
        offsets += [(a - len(lead) + begin, b - len(lead) + begin) for a, b in part["offset_mapping"][skip:]]
    return ids, offsets


def first_line(error: BaseException) -> str:
    """An exception's message, one line of at most 200 characters."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def template_notes(processor: TextProcessor, *, where: str = "chat template") -> list[str]:
    """What a user should know before training with this template: where generation is asked in another way than was trained,
    what is learned beside the answers, and whether anything ends a turn. [] where all is as expected."""
    notes = _notes(processor, {}, where)
    if not any(note.cure for note in notes):
        return [note.text for note in notes]
    return [note.text + (_cure(processor, len(notes), where) if note.cure else "") for note in notes]


@dataclass(frozen=True)
class _Note:
    text: str
    cure: bool
    """Whether another value of a template's variable may help."""


def _notes(processor: TextProcessor, options: Mapping[str, Any], where: str) -> list[_Note]:
    talk = [("user", "mllm-asks"), ("assistant", "mllm-says"), ("user", "mllm-asks-on"), ("assistant", "mllm-says-on")]
    messages = [{"role": role, "content": content} for role, content in talk]
    tokenizer, template = processor.tokenizer, processor.chat_template
    render = ChatRenderer(processor, **options)
    known = {"template": template, "tokens": added_texts(tokenizer), "where": where}
    text, (one,) = find_replies(render, messages[:2], **known)
    request = render(messages[:1], True)
    notes: list[_Note] = []
    if not one.prompted:
        notes.append(
            _Note(
                f"{where}: generate is asked {_tail(request)}, but trained is {_tail(text[: one.begin])}: no prefix.",
                True,
            )
        )
    if one.lead.strip():
        notes.append(_Note(f"{where}: every answer begins with {one.lead!r}, which is learned and generated.", True))
    if not text[one.begin : one.end].rstrip().startswith(one.lead + "mllm-says") or not _closing(tokenizer, text, one):
        notes.append(
            _Note(f"{where}: no token ends the assistant's turn (it ends {text[one.end - 6 : one.end]!r}); generation stops only at EOS "
                  "or max_new_tokens.", False)
        )  # fmt: skip
    try:
        both, (first, second) = find_replies(render, messages, **known)
    except DataError as error:
        return [*notes, _Note(f"{where}: conversations of several turns are refused ({error}).", False)]
    leads = {first.lead, second.lead}
    if len(leads) > 1 or not (first.prompted and second.prompted):
        notes.append(
            _Note(
                f"{where}: of several turns only the last is trained as it is generated: an earlier answer follows "
                f"{_tail(both[: first.begin] + first.lead)}, the last {_tail(both[: second.begin] + second.lead)}. Where that matters make "
                "a sample of each turn, or give model.chat_template one that renders all turns alike.",
                False,
            )
        )
    return notes


def _closing(tokenizer: TextTokenizer, text: str, reply: Reply) -> bool:
    ids = tokenizer(text[reply.begin : reply.end], add_special_tokens=False)["input_ids"]
    return bool(ids) and (ids[-1] in special_ids(tokenizer) or ids[-1] in tokenizer.added_tokens_decoder)


def _cure(processor: TextProcessor, problems: int, where: str) -> str:
    """The setting of one of the template's variables that leaves fewer things to note."""
    for name in template_variables(unwrapped(processor.chat_template)):
        for value in (False, True):
            try:
                left = len(_notes(processor, {name: value}, where))
            except DataError:
                continue
            if left < problems:
                return f" Cure: model.template_options: {{{name}: {str(value).lower()}}}"
    return " Cure: another model.chat_template"


def _tail(text: str) -> str:
    return repr("…" + text[-40:] if len(text) > 40 else text)


def added_texts(tokenizer: TextTokenizer) -> list[str]:
    """Texts of the tokenizer's added tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values()]
