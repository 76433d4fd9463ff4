"""How does a conversation become token ids and labels?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.processing.template import messages_of
from mllm.types import IMAGE_MARK, Sample, Turn

IGNORE = -100
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass
class EncodedSample:
    """One sample ready to be batched.

    input_ids, labels ``(T,)`` int64 (labels -100 where no loss is taken); pixels: batch key → ``(num_images, 3, H, W)``;
    extras: further per-image tensors by batch key (``router_input_ids``, ``expert_weights`` …); truncated: text was cut.
    """

    id: str
    dataset: str
    input_ids: Tensor
    labels: Tensor
    pixels: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    num_images: int = 0
    truncated: bool = False
    targets: Tensor | None = None
    """Images that the assistant draws, in order: pixels ``(K, 3, H, W)`` in [-1, 1], or packed codes ``(K, S)``."""

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss."""
        return int((self.labels[1:] != IGNORE).sum())


def render_prompt(processor: Any, turns: Sequence[Turn], *, add_generation_prompt: bool = True) -> str:
    """The conversation as the model reads it, one placeholder per image."""
    return processor.tokenizer.apply_chat_template(
        messages_of(turns, IMAGE_MARK),
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )


def encode_text(processor: Any, turns: Sequence[Turn], *, where: str = "sample") -> tuple[Tensor, Tensor]:
    """Token ids and labels ``(T,)`` of a conversation, placeholders expanded.

    Labels cover what the assistant says, turn by turn, and the special token that ends its turn, for any chat template: the
    answers are rendered between private-use marks, located, and the marks taken out again; that this changes nothing else is
    checked. An image in an assistant turn is one that the model draws, where it draws any (`VisualSpan`): its start, end and
    code placeholders are labels. Raises `DataError` when a template does not reproduce an answer.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer has no fast version (no character offsets), which label masking needs")
    span = getattr(processor, "span", None)
    disarm = _strip_private if span is None else lambda text: span.disarm(_strip_private(text))
    turns = [Turn(t.role, disarm(t.content), t.learn) for t in turns]
    plain = render_prompt(processor, turns, add_generation_prompt=False)
    marked_turns = [Turn(t.role, f"{_OPEN}{t.content}{_CLOSE}", t.learn) if t.role == "assistant" else t for t in turns]
    marked = render_prompt(processor, marked_turns, add_generation_prompt=False)
    answers = [turn for turn in turns if turn.role == "assistant"]
    spans, text = _take_marks(marked)
    if len(spans) != len(answers):
        raise DataError(
            f"{where}: the chat template renders {len(spans)} of {len(answers)} assistant turns; labels cannot be placed"
        )
    if text != plain:
        spans = _realign(spans, text, plain, where)
        text = plain
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    special = set(tokenizer.all_special_ids)
    offsets = encoding["offset_mapping"]
    starts = [start for start, _ in offsets]
    cursor = 0
    drawn: list[int] = []
    for (begin, end), turn in zip(spans, answers):
        while cursor < len(starts) and offsets[cursor][1] <= begin:
            cursor += 1
        position = cursor
        while position < len(starts) and starts[position] < end:
            image = int(ids[position]) == processor.image_token_id
            if image and span is not None:
                drawn.append(position)
                if position == cursor and turn.learn and text[offsets[position - 1][0] : begin] == " ":
                    labels[position - 1] = ids[position - 1]  # before words the blank is part of the word, and learned
            if turn.learn and (not image or span is not None):
                labels[position] = ids[position]
            position += 1
        if turn.learn and position < len(starts) and int(ids[position]) in special:
            labels[position] = ids[position]
        cursor = position
    repeats = torch.where(ids == processor.image_token_id, processor.num_image_tokens, 1)
    if span is not None and drawn:
        repeats[drawn] = 1
        places = (repeats.cumsum(0) - 1)[drawn].tolist()
        return span.insert(ids.repeat_interleave(repeats), labels.repeat_interleave(repeats), places)
    return ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)


def encode_sample(processor: Any, sample: Sample, max_length: int | None = None) -> EncodedSample:
    """A sample as tensors: ids, labels, every encoder's pixels.

    Too long: trailing turns, then trailing text, are dropped, never part of an image span, and at least one label must stay;
    otherwise `DataError` (set aside). Wrong image counts raise `AlignmentError`. Both name the sample. ``meta["experts"]`` fixes
    the sample's routing, as ``experts`` of the processor does. A processor with an ``encode_sample`` of its own is asked.
    """
    if hasattr(processor, "encode_sample"):
        return processor.encode_sample(sample, max_length)
    where = f"sample {sample.id!r}" + (f" of {sample.dataset}" if sample.dataset else "")
    marks = sum(turn.content.count(IMAGE_MARK) for turn in sample.turns)
    if marks != len(sample.images):
        raise AlignmentError(f"{where}: {marks} image placeholders and {len(sample.images)} images")
    span = getattr(processor, "span", None)
    inputs, targets = split_images(sample.turns, sample.images, drawn=span is not None)
    ids, labels = encode_text(processor, sample.turns, where=where)
    truncated = False
    if max_length is not None and len(ids) > max_length:
        ids, labels = _shorten(processor, ids, labels, max_length, where)
        truncated = True
    if not (labels[1:] != IGNORE).any():
        raise DataError(f"{where}: no token carries loss (no assistant turn to learn from)")
    num_images = int((ids == processor.image_token_id).sum()) // max(processor.num_image_tokens, 1)
    encoded = EncodedSample(sample.id, sample.dataset, ids, labels, num_images=num_images, truncated=truncated)
    if num_images:
        routed = bool(processor.image_processor.experts)
        experts = {"experts": sample.meta["experts"]} if routed and sample.meta.get("experts") is not None else {}
        encoded.pixels, encoded.extras = encode_pixels(processor, inputs[:num_images], where=where, **experts)
        encoded.extras.update(routing_inputs(processor, sample.turns, num_images))
    if span is not None and targets:
        kept = len(span.starts(ids))
        span.check(ids, kept)
        encoded.targets = encode_targets(processor, targets[:kept], where=where) if kept else None
    return encoded


def split_images(turns: Sequence[Turn], images: Sequence[Any], *, drawn: bool) -> tuple[list[Any], list[Any]]:
    """(images that are read, images that the assistant draws) of a sample; without ``drawn`` all are read."""
    owners = [turn.role == "assistant" and drawn for turn in turns for _ in range(turn.content.count(IMAGE_MARK))]
    return (
        [image for image, own in zip(images, owners) if not own],
        [image for image, own in zip(images, owners) if own],
    )


def encode_targets(processor: Any, images: Sequence[Any], *, where: str) -> Tensor:
    """Images to draw: pixels ``(K, 3, H, W)`` as the visual tokenizer takes them, or codes ``(K, S)`` where the images
    are given by stored codes. Raises `DataError` naming the sample."""
    from mllm.processing.codes import read_codes
    from mllm.processing.image_processor import stack_images
    from mllm.processing.images import load_image, to_pixels_multi

    settings, rows = (
        getattr(processor, "processor", processor).image_processor,
        [],
    )  # a feature cache wraps the processor
    try:
        for position, image in enumerate(images):
            name = f"image {position}"
            codes = read_codes(image, where=name, source=getattr(settings, "code_source", None))
            if codes is None:
                picture = load_image(image, where=name, max_pixels=settings.max_pixels)
                codes = to_pixels_multi(picture, {"": processor.span.image}, resampler=settings.resampler)[""]
            elif len(codes) != processor.span.num_codes:
                raise DataError(
                    f"{name} has {len(codes)} codes, the model's tokenizer writes {processor.span.num_codes}"
                )
            rows.append(codes)
        return stack_images(rows)
    except (DataError, ConfigError) as error:
        raise DataError(f"{where}: {error}") from error


def encode_pixels(
    processor: Any, images: Sequence[Any], *, where: str, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pixels by batch key, and other per-image tensors. Raises `DataError` naming the sample."""
    try:
        data = dict(processor.image_processor(list(images), **options))
    except (DataError, ConfigError) as error:
        raise DataError(f"{where}: {error}") from error
    keys = set(processor.pixel_keys.values())
    return {k: v for k, v in data.items() if k in keys}, {k: v for k, v in data.items() if k not in keys}


def routing_inputs(processor: Any, turns: Sequence[Turn], num_images: int) -> dict[str, Tensor]:
    """``router_input_ids`` ``(num_images, T)``, padded with -1: for each image, the user turn that holds it. Empty when the
    model routes nothing."""
    if not processor.image_processor.experts or not num_images:
        return {}
    questions = [
        question_text(turn.content, processor.image_token)
        for turn in turns
        for _ in range(turn.content.count(IMAGE_MARK))
    ]
    ids = [processor.tokenizer(q, add_special_tokens=False)["input_ids"] for q in questions[:num_images]]
    return {"router_input_ids": pad_questions(ids)}


def question_text(turn: str, image_token: str) -> str:
    """What a router reads of a user turn: its words with single spaces, without image marks and placeholders."""
    typed = image_token[:1] + " " + image_token[1:]
    for mark, text in ((IMAGE_MARK, " "), (typed, " "), (image_token, " ")):
        turn = turn.replace(mark, text)
    return " ".join(turn.split())


def pad_questions(ids: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of several questions as ``(B, T)`` int64, padded with -1."""
    width = max([1, *(len(row) for row in ids)])
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids], dtype=torch.long).reshape(len(ids), width)


def _strip_private(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _take_marks(marked: str) -> tuple[list[tuple[int, int]], str]:
    spans: list[tuple[int, int]] = []
    out: list[str] = []
    length = 0
    begin = None
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            begin = length
        elif piece == _CLOSE:
            if begin is not None:
                spans.append((begin, length))
            begin = None
        else:
            out.append(piece)
            length += len(piece)
    return spans, "".join(out)


def _realign(spans: list[tuple[int, int]], text: str, plain: str, where: str) -> list[tuple[int, int]]:
    """Spans in ``plain`` when the template trims answers: the same text up to white space around the answers."""
    moved: list[tuple[int, int]] = []
    cursor, last = 0, 0
    for begin, end in spans:
        between = text[last:begin]
        position = cursor + len(between)
        answer = text[begin:end]
        for candidate in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            if plain.startswith(between, cursor) and plain.startswith(candidate, position):
                moved.append((position, position + len(candidate)))
                cursor = position + len(candidate)
                break
        else:
            raise DataError(f"{where}: the chat template rewrites assistant turns; labels cannot be placed")
        last = end
    if plain[cursor:] != text[last:]:
        raise DataError(f"{where}: the chat template rewrites assistant turns; labels cannot be placed")
    return moved


def _shorten(processor: Any, ids: Tensor, labels: Tensor, max_length: int, where: str) -> tuple[Tensor, Tensor]:
    """Cut text at the end; if the cut falls into an image span, cut before the span; some label must remain."""
    cut = max_length
    image_id, per_image = processor.image_token_id, max(processor.num_image_tokens, 1)
    inside = int((ids[:cut] == image_id).sum()) % per_image
    cut -= inside
    span = getattr(processor, "span", None)
    cut = cut if span is None else span.before_cut(ids, cut)
    if not (labels[1:cut] != IGNORE).any():
        raise DataError(
            f"{where}: {len(ids)} tokens do not fit max_length={max_length} (nothing to learn from would remain); set aside. "
            f"Raise max_length, or use a connector with fewer tokens per image ({processor.num_image_tokens})"
        )
    return ids[:cut], labels[:cut]
