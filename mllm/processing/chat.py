"""How does a conversation become token ids and labels? Called after the chat template, which decides both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError, DataError, did_you_mean
from mllm.processing.layout import before_cut, expand, taken, visual_spans
from mllm.processing.protocol import Processor, Templated, TextProcessor
from mllm.processing.questions import pad_questions, question_text
from mllm.processing.template import messages_of
from mllm.processing.turns import IGNORE, ChatRenderer, added_texts, find_replies, label_text, special_ids
from mllm.types import IMAGE_MARK, VISUAL_TOKENS, Sample, Turn, Video, VisualLayout

_log = logging.getLogger(__name__)


@dataclass
class EncodedSample:
    """One sample ready to be batched.

    input_ids, labels ``(T,)`` int64 (labels -100 where no loss is taken); pixels: batch key → ``(V, 3, H, W)``, the views of
    all images; extras: further per-image tensors by batch key (``image_sizes``, ``router_input_ids`` …); num_views: V by
    batch key, where it is not the number of images; truncated: text was cut.
    """

    id: str
    dataset: str
    input_ids: Tensor
    labels: Tensor
    pixels: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    num_images: int = 0
    truncated: bool = False
    num_views: dict[str, int] = field(default_factory=dict)
    targets: Tensor | None = None
    """Images that the assistant draws, in order: pixels ``(K, 3, H, W)`` in [-1, 1], or packed codes ``(K, S)``."""
    masks: Tensor | None = None
    """What the assistant marks, one for each of its mask tokens that is learned: uint8 ``(K, rows, columns)``, 255 does not count."""
    examples: Tensor | None = None
    """What its questions show on other pictures, one for each token of theirs: uint8 ``(E, rows, columns)``."""
    geometry: dict[str, Tensor] = field(default_factory=dict)
    """What heads of geometry learn, by batch key, a row for each frame that is seen (`mllm.processing.geometry`)."""

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss."""
        return int((self.labels[1:] != IGNORE).sum())


def render_prompt(
    processor: Templated, turns: Sequence[Turn], *, tools: Any = None, add_generation_prompt: bool = True
) -> str:
    """The conversation as the model reads it, one placeholder per image."""
    return ChatRenderer(processor, tools)(messages_of(turns, IMAGE_MARK), add_generation_prompt)


def encode_text(
    processor: TextProcessor,
    turns: Sequence[Turn],
    *,
    tools: Any = None,
    where: str = "sample",
    layouts: Sequence[VisualLayout] | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``(T,)`` of a conversation, placeholders expanded as ``layouts`` say: one for each image that is
    read, in order (None: every image has the same number of tokens).

    Learned is everything between the generation prompt and the end of the assistant's turn, that end included, turn by turn,
    for any chat template (`mllm.processing.turns`). An image in an assistant turn is one that the model draws, where it draws
    any (`VisualSpan`): its start, end and code placeholders are labels. tools: what the assistant may call, as OpenAI
    describes it. Raises `DataError` when a template does not reproduce what is said.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer has no fast version (no character offsets), which label masking needs")
    span = getattr(processor, "span", None)
    if span is not None:
        turns = [replace(turn, content=span.escape_tokens(turn.content)) for turn in turns]
    learn = [turn.learn for turn in turns]
    text, replies = find_replies(
        ChatRenderer(processor, tools),
        messages_of(turns, IMAGE_MARK),
        template=processor.chat_template,
        tokens=added_texts(tokenizer),
        learn=learn,
        tools=tools,
        where=where,
    )
    ids, labels, places = label_text(tokenizer, text, replies, [learn[reply.turn] for reply in replies])
    images = ids == processor.image_token_id
    own = torch.zeros_like(images)
    if span is not None:
        for place in places:
            own[place] = True
    labels[images & ~own] = IGNORE
    read, drawn = ((images & kind).nonzero().flatten() for kind in (~own, own))
    given: Sequence[VisualLayout] = (
        processor.image_layouts([None] * len(read), where=where) if layouts is None else layouts
    )
    if len(given) != len(read):
        raise AlignmentError(f"{where}: {len(read)} image placeholders and {len(given)} images")
    longer, repeats = expand(ids, read.tolist(), given)
    labels = taken(labels, repeats)
    if span is None:
        return longer, labels
    return span.insert(longer, labels, (repeats.cumsum(0) - 1)[drawn].tolist())


def count_tokens(processor: TextProcessor, sample: Sample, *, where: str) -> int:
    """Tokens of a sample, visual ones included; of its images at most the headers are read."""
    drawn = getattr(processor, "span", None) is not None
    layouts = sample_layouts(processor, sample, split_images(sample.turns, sample.images, drawn=drawn)[0], where)
    return len(encode_text(processor, sample.turns, tools=sample.meta.get("tools"), where=where, layouts=layouts)[0])


def sample_layouts(processor: TextProcessor, sample: Sample, images: Sequence[Any], where: str) -> list[VisualLayout]:
    """The tokens of a sample's pictures, by its dataset's ``visual_tokens`` where it has one."""
    return processor.image_layouts(images, where=where, visual_tokens=sample.meta.get(VISUAL_TOKENS) or 0)


def turn_ends(processor: TextProcessor) -> list[int]:
    """Ids of the tokens by which the chat template ends what the assistant says, mid-way, at the end and after a tool call.
    A template that ends turns with plain text has none."""
    tokenizer = processor.tokenizer
    call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {"x": 1}}}
    probes = [
        [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")],
        [Turn("user", "a"), Turn("assistant", "b")],
        [Turn("user", "a"), Turn("assistant", "", calls=[call])],
    ]
    closing = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    found: list[int] = []
    for turns in probes:
        try:
            ids, labels = encode_text(processor, turns, where="chat template")
        except DataError:
            continue
        learned = (labels != IGNORE).tolist()
        last = [k for k in range(len(ids)) if learned[k] and not (k + 1 < len(ids) and learned[k + 1])]
        found += [int(ids[k]) for k in last if int(ids[k]) in closing and int(ids[k]) not in found]
    return found


def encode_sample(processor: TextProcessor, sample: Sample, max_length: int | None = None) -> EncodedSample:
    """A sample as tensors: ids, labels, every encoder's pixels.

    Too long: trailing turns, then trailing text, are dropped, never part of an image span, and at least one label must stay;
    otherwise `DataError` (set aside). Wrong image counts raise `AlignmentError`. Both name the sample. ``meta["experts"]`` fixes
    the sample's routing, as ``experts`` of the processor does. A processor with an ``encode_sample`` of its own is asked.
    """
    own = getattr(processor, "encode_sample", None)
    return _encode(cast("Processor", processor), sample, max_length) if own is None else own(sample, max_length)


def _encode(processor: Processor, sample: Sample, max_length: int | None) -> EncodedSample:
    where = f"sample {sample.id!r}" + (f" of {sample.dataset}" if sample.dataset else "")
    marks = sum(turn.content.count(IMAGE_MARK) for turn in sample.turns)
    if marks != len(sample.images):
        raise AlignmentError(f"{where}: {marks} image placeholders and {len(sample.images)} images")
    span = getattr(processor, "span", None)
    inputs, targets = split_images(sample.turns, sample.images, drawn=span is not None)
    layouts = sample_layouts(processor, sample, inputs, where)
    ids, labels = encode_text(processor, sample.turns, tools=sample.meta.get("tools"), where=where, layouts=layouts)
    truncated, spans = False, visual_spans(ids, processor.image_token_id, layouts)
    if max_length is not None and len(ids) > max_length:
        ids, labels = _shorten(processor, ids, labels, max_length, where, spans)
        truncated = True
    if not (labels[1:] != IGNORE).any():
        raise DataError(f"{where}: no token carries loss (no assistant turn to learn from)")
    num_images = sum(stop <= len(ids) for _, stop in spans)
    encoded = EncodedSample(sample.id, sample.dataset, ids, labels, num_images=num_images, truncated=truncated)
    if num_images:
        routed = bool(processor.image_processor.experts)
        experts = {"experts": sample.meta["experts"]} if routed and sample.meta.get("experts") is not None else {}
        rules = getattr(processor, "rules", None)
        share = 0 if rules is None else rules.share(len(inputs), sample.meta.get(VISUAL_TOKENS) or 0)
        budget = {"visual_tokens": share} if share else {}  # what is cut off counted, when the tokens were
        encoded.pixels, encoded.extras = encode_pixels(processor, inputs[:num_images], where=where, **experts, **budget)
        encoded.extras.update(routing_inputs(processor, sample.turns, num_images))
        keys = processor.pixel_keys
        encoded.num_views = {
            keys[name]: sum(layout.rows_of(name) for layout in layouts[:num_images])
            for name in keys
            if keys[name] in encoded.pixels
        }
    if span is not None and targets:
        kept = len(span.starts(ids))
        span.check(ids, kept)
        encoded.targets = encode_targets(processor, targets[:kept], where=where) if kept else None
    encoded.masks, encoded.examples = masks_of(processor, sample, inputs, ids, labels, where=where)
    encoded.geometry = geometry_of(processor, sample, inputs[:num_images], where=where)
    return encoded


def masks_of(
    processor: Processor, sample: Sample, pictures: Sequence[Any], ids: Tensor, labels: Tensor, *, where: str
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of a sample whose tokens are learned, uint8 ``(K, rows, columns)``, and those that its questions show; None where there
    are none. pictures: those that are read; ids, labels ``(T,)``: after the text was cut, whose masks go with it. Raises `DataError` for
    masks that do not fit."""
    from mllm.processing.segments import encode_masks, share_masks, split_examples

    spec = getattr(getattr(processor, "processor", processor), "segments", None)  # a feature cache wraps the processor
    if spec is None:
        if sample.masks:
            raise DataError(
                f"{where}: the sample has masks, and no head of this model learns from them (type segmentation)"
            )
        return None, None
    answers, examples, of = split_examples(spec, sample.turns, sample.masks, where=where)
    texts, shown = [], 0
    for turn in sample.turns:
        if turn.role == "assistant":
            texts.append((turn.content, shown, turn.learn))
        else:
            shown += turn.content.count(IMAGE_MARK)
    kept, owners = share_masks(spec, texts, answers, where=where)
    found: list[Tensor | None] = []
    for tokens, entries, places in (
        (labels == spec.token_id, kept, owners),
        (ids == (-1 if spec.example is None else spec.example.token_id), examples, of),
    ):
        number = int(tokens.sum())
        laid = encode_masks(spec, entries[:number], pictures, places[:number], where=where) if number else None
        found.append(laid)
    return found[0], found[1]


def geometry_of(processor: Processor, sample: Sample, visuals: Sequence[Any], *, where: str) -> dict[str, Tensor]:
    """What heads of geometry learn of a sample, by batch key; {} for a model without such a head. visuals: images and videos that are
    read and were not cut off. Raises `DataError` for poses and depth maps that do not fit."""
    spec = getattr(getattr(processor, "processor", processor), "geometry", None)  # a feature cache wraps the processor
    if spec is None:
        given = [name for name, told in (("poses", sample.poses), ("depths", sample.depths)) if told]
        if unread := [name for name in given if name not in _inputs_of(getattr(processor, "processor", processor))]:
            _tell_unread(sample.dataset, unread[0])
        return {}
    for what, wanted, told in (("poses", spec.poses, sample.poses), ("depths", spec.depth is not None, sample.depths)):
        if wanted and not told and any(isinstance(visual, Video) for visual in visuals):
            _tell_missing(sample.dataset, what, tuple(sorted(map(str, sample.meta))))
    from mllm.processing.geometry import encode_geometry

    return encode_geometry(getattr(processor, "processor", processor), spec, sample, visuals, where=where)


def _inputs_of(processor: Processor) -> set[str]:
    """Which of a row's poses and depths a model is shown beside the pixels, or has its frames chosen by."""
    specs, film = processor.image_processor.specs.values(), processor.rules.video
    if any(spec.points for spec in specs) or (film is not None and film.which == "space_aware"):
        return {"poses", "depths"}
    return {"poses"} if any(spec.cameras for spec in specs) else set()


@lru_cache(maxsize=64)
def _tell_unread(dataset: str, what: str) -> None:
    """Said once a dataset: the model that is trained beside one that uses them may well be on the same rows."""
    _log.warning("%s: its rows have %s, and no head of this model learns from them", dataset or "a sample", what)


@lru_cache(maxsize=64)
def _tell_missing(dataset: str, what: str, keys: tuple[str, ...]) -> None:
    """Said once a dataset: rows without may well stand among others, or their key may be misspelt."""
    near = did_you_mean(what, keys).replace("did you mean", "is it")
    _log.warning(
        "%s: a head of this model learns from %s, and a row of it has none%s", dataset or "a sample", what, near
    )


def split_images(turns: Sequence[Turn], images: Sequence[Any], *, drawn: bool) -> tuple[list[Any], list[Any]]:
    """(images that are read, images that the assistant draws) of a sample; without ``drawn`` all are read."""
    owners = [turn.role == "assistant" and drawn for turn in turns for _ in range(turn.content.count(IMAGE_MARK))]
    return (
        [image for image, own in zip(images, owners) if not own],
        [image for image, own in zip(images, owners) if own],
    )


def encode_targets(processor: Processor, images: Sequence[Any], *, where: str) -> Tensor:
    """Images to draw: pixels ``(K, 3, H, W)`` as the visual tokenizer takes them, or codes ``(K, S)`` where the images
    are given by stored codes. Raises `DataError` naming the sample."""
    from mllm.processing.codes import read_codes
    from mllm.processing.image_processor import stack_images
    from mllm.processing.images import load_image, to_pixels_multi

    span, rows = processor.span, []
    assert span is not None  # only asked where something is drawn
    settings = getattr(processor, "processor", processor).image_processor  # a feature cache wraps the processor
    try:
        for position, image in enumerate(images):
            name = f"image {position}"
            codes = read_codes(image, where=name, source=getattr(settings, "code_source", None))
            if codes is None:
                picture = load_image(image, where=name, max_pixels=settings.max_pixels)
                codes = to_pixels_multi(picture, {"": span.image}, resampler=settings.resampler)[""]
            elif len(codes) != span.num_codes:
                raise DataError(f"{name} has {len(codes)} codes, the model's tokenizer writes {span.num_codes}")
            rows.append(codes)
        return stack_images(rows)
    except (DataError, ConfigError) as error:
        raise DataError(f"{where}: {error}") from error


def encode_pixels(
    processor: Processor, images: Sequence[Any], *, where: str, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pixels by batch key, and other per-image tensors. Raises `DataError` naming the sample."""
    try:
        data = dict(processor.image_processor(list(images), **options))
    except (DataError, ConfigError) as error:
        raise DataError(f"{where}: {error}") from error
    return processor.pixel_keys.split(data)


def routing_inputs(processor: Processor, turns: Sequence[Turn], num_images: int) -> dict[str, Tensor]:
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


def _shorten(
    processor: Processor, ids: Tensor, labels: Tensor, max_length: int, where: str, spans: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Cut text at the end; if the cut falls into an image (``spans``), cut before it; some label must remain."""
    cut = before_cut(spans, max_length)
    span = getattr(processor, "span", None)
    cut = cut if span is None else span.before_cut(ids, cut)
    if not (labels[1:cut] != IGNORE).any():
        longest = max((stop - start for start, stop in spans), default=0)
        raise DataError(
            f"{where}: {len(ids)} tokens do not fit max_length={max_length} (nothing to learn from would remain); set aside. "
            f"Raise max_length, or use a connector with fewer tokens per image ({longest})"
        )
    return ids[:cut], labels[:cut]


def longest_conversation(text_config: Any) -> int | None:
    """Count the tokens that a language model reads, as vLLM derives them: its positions, times what its rotary embedding is
    stretched by.

    Args:
        text_config: the language model's config.

    Returns:
        Tokens of prompt and answer; None where the config does not say.
    """
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit:
        return None
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("yarn", "linear", "dynamic"):
        limit = (rope.get("original_max_position_embeddings") or limit) * rope.get("factor", 1.0)
    return int(limit)
