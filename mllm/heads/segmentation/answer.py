"""How does the model mark what a phrase names: ask, read the answer, decode its masks, lay them on the picture?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from mllm.errors import ConfigError, DataError
from mllm.heads.answers import answer
from mllm.heads.base import MultimodalModel
from mllm.heads.segmentation.in_context import Examples
from mllm.processing.images import image_size
from mllm.processing.mask_files import box_of, encode_rle, outlines, read_mask
from mllm.processing.protocol import Processor
from mllm.processing.segments import SegmentSpec

_AT_ONCE = 1 << 24
"""Probabilities of pixels that are held at a time: of larger pictures, or many masks, some rows after others."""
OVERLAY = ((230, 60, 60), (60, 120, 230), (60, 180, 90), (230, 160, 40))


@dataclass
class Segments:
    """One answer with its masks.

    text: the answer, mask tokens included; masks ``(N, height, width)`` bool, on the picture as it was given; scores ``(N,)``: mean
    probability inside each mask, 0 for an empty one. No mask token in the answer: N is 0.
    """

    text: str
    masks: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def union(self) -> Tensor:
        """``(height, width)`` bool: everything that is marked."""
        return self.masks.any(0)

    def rle(self) -> list[dict[str, Any]]:
        """Run lengths as COCO has them, ``{"size": [h, w], "counts": "…"}``."""
        return [encode_rle(mask) for mask in self._arrays()]

    def polygons(self) -> list[list[list[int]]]:
        """For each mask its rings ``[x, y, x, y, …]`` along the pixels' edges; inner rings go round holes."""
        return [outlines(mask) for mask in self._arrays()]

    def boxes(self) -> list[list[int] | None]:
        """``[x, y, width, height]`` in pixels; None for an empty mask."""
        return [box_of(mask) for mask in self._arrays()]

    def records(self, spec: SegmentSpec, question: str) -> list[dict[str, Any]]:
        """What a server answers of each mask: ``phrase`` (`phrases_of`), ``score``, ``box`` and ``rle``. question: what was asked."""
        parts = zip(phrases_of(spec, question, self.text), self.scores.tolist(), self.boxes(), self.rle())
        return [{"phrase": p, "score": round(score, 4), "box": box, "rle": rle} for p, score, box, rle in parts]

    def overlay(self, picture: Image.Image, strength: float = 0.5) -> Image.Image:
        """The picture with every mask in a colour of its own."""
        values = np.asarray(picture.convert("RGB")).astype(np.float32)
        for number, mask in enumerate(self._arrays()):
            values[mask] = (1 - strength) * values[mask] + strength * np.array(OVERLAY[number % len(OVERLAY)])
        return Image.fromarray(values.round().astype(np.uint8))

    def _arrays(self) -> list[np.ndarray]:
        return list(self.masks.cpu().numpy())


class SegmentationMixin:
    """The marking side of `MllmForConditionalGeneration`; means something when one of its heads is a segmentation head."""

    config: PreTrainedConfig
    model: Any
    heads: Any
    device: Any

    def segment(
        self: MultimodalModel,
        images: Any,
        phrases: str | Sequence[str] | None = None,
        *,
        questions: str | Sequence[str] | None = None,
        example: Any = None,
        processor: Processor | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> Any:
        """Mark what phrases name in pictures.

        Args:
            images: a picture or a list (paths, PIL, arrays, bytes).
            phrases: what to mark in each, one for all or one each, asked for in the words the model was trained with.
            questions: the whole question in place of a phrase.
            example: another picture and its mask (as a row of training data may hold it: an array of 0 and 1, a file, run lengths), whose
                like is marked; or a list of such pairs, one for each picture. Asked for in the head's own words where neither phrases
                nor questions are given. Needs a head with ``examples``.
            processor: the model's own (default: the one saved beside it).
            threshold: probability above which a pixel is marked; default: the head's own.
            options: as ``generate`` takes them.

        Returns:
            `Segments`, a list of them for a list of pictures.

        Raises:
            ConfigError: the model marks nothing or takes no examples, phrases or examples and pictures differ in number, or threshold is no
                probability.
            DataError: an example's mask has another size than its picture, or marks nothing.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold: {threshold} is no probability between 0 and 1")
        alone = not isinstance(images, (list, tuple))
        pictures = [images] if alone else list(images)
        own, name = _own_processor(self, processor), _segmentation_head(self)
        shown = None if example is None else _shown(own[1], example, len(pictures))
        if shown is not None and phrases is None and questions is None and own[1].example is not None:
            questions = own[1].example.question
        texts = _questions(own[1], phrases, questions, len(pictures))
        found = _segment(self, self.heads[name], own, pictures, texts, threshold, options, shown)
        return found[0] if alone else found


def _segmentation_head(model: MultimodalModel) -> str:
    from mllm.heads.segmentation.build import segmentation_heads

    names = segmentation_heads(model.config.heads)
    if not names:
        raise ConfigError(
            "this model marks nothing: none of its heads is of type segmentation. Train one with model.heads in the recipe (see "
            "recipes/segmentation_demo.yaml)"
        )
    return names[0]


def _own_processor(model: MultimodalModel, processor: Processor | None) -> tuple[Processor, SegmentSpec]:
    if processor is None and model.name_or_path:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model.name_or_path)
    segments = getattr(processor, "segments", None)
    if processor is None or segments is None:
        raise ConfigError(
            "processor: give this model's own processor (AutoProcessor.from_pretrained of the same folder), which knows how its "
            "masks lie"
        )
    return processor, segments


def _questions(segments: SegmentSpec, phrases: Any, questions: Any, number: int) -> list[str]:
    if (phrases is None) == (questions is None):
        raise ConfigError("segment: give phrases (what to mark) or questions (the whole question), one of the two")
    given = phrases if questions is None else questions
    given = [given] * number if isinstance(given, str) else list(given)
    if len(given) != number:
        raise ConfigError(f"segment: {len(given)} phrases for {number} pictures; give one for all, or one each")
    return given if phrases is None else [segments.question.format(phrase=phrase) for phrase in given]


def _shown(segments: SegmentSpec, example: Any, number: int) -> list[tuple[Any, Tensor]]:
    """Pictures that questions show, each with its mask uint8 ``(rows, columns)`` on what the encoder sees."""
    if segments.example is None:
        raise ConfigError(
            "segment: this model was not trained with examples; set model.heads.NAME.examples: {} in its recipe, and give rows whose "
            "questions show a picture with a mask"
        )
    pairs = list(example) if isinstance(example, list) else [example] * number
    if len(pairs) != number:
        raise ConfigError(f"segment: {len(pairs)} examples for {number} pictures; give one for all, or one each")
    found = []
    for place, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(f"segment: example {place} is {type(pair).__name__}; give (picture, mask)")
        where = f"example {place}"
        size = image_size(pair[0], where=where)
        mask = read_mask(np.asarray(pair[1].cpu()) if isinstance(pair[1], Tensor) else pair[1], size, where=where)
        if not (mask == 1).any():
            raise DataError(f"{where}: its mask marks nothing, so nothing is like it")
        found.append((pair[0], segments.lay(mask)))
    return found


@torch.no_grad()
def _segment(
    model: MultimodalModel,
    head: Any,
    own: tuple[Processor, SegmentSpec],
    pictures: Sequence[Any],
    questions: Sequence[str],
    threshold: float | None,
    options: dict[str, Any],
    shown: Sequence[tuple[Any, Tensor]] | None = None,
) -> list[Segments]:
    processor, segments = own
    before = None
    if shown is not None and segments.example is not None:
        before = [(picture, segments.example.token) for picture, _ in shown]
    answered = answer(model, processor, pictures, questions, options, before=before)
    marks = (answered.answers == head.config.tokens["mark"]).nonzero()
    places = head.places(marks + marks.new_tensor([0, answered.start]))
    owners, examples = marks[:, 0], None
    if shown is not None:  # each question shows two pictures
        masks = torch.stack([mask for _, mask in shown])
        examples = Examples(masks, 2 * torch.arange(len(shown), device=marks.device), marks[:, 0])
        owners = 2 * marks[:, 0] + 1
    begins = torch.full_like(owners, answered.start - 1)
    logits, _ = head.predict(answered.hidden, places, owners, answered.features[head.config.encoder], examples, begins)
    least: float = head.config.threshold if threshold is None else threshold
    found = []
    for number, picture in enumerate(pictures):
        size = image_size(picture, where=f"picture {number}")
        found.append(laid(segments, answered.texts[number], logits[marks[:, 0] == number], size, least))
    return found


def laid(spec: SegmentSpec, text: str, logits: Tensor, size: tuple[int, int], threshold: float) -> Segments:
    """An answer's masks on its picture.

    Args:
        spec: of the model's processor.
        text: the answer.
        logits: ``(N, rows, columns)``, as the head predicts them.
        size: (height, width) of the picture.
        threshold: probability above which a pixel is marked.

    Returns:
        The answer with its N masks; beside them little is held, however large the picture.
    """
    masks = torch.zeros(len(logits), *size, dtype=torch.bool)
    area, total = (torch.zeros(len(logits), device=logits.device) for _ in range(2))
    step = max(1, _AT_ONCE // max(1, len(logits) * size[1]))
    for first in range(0, size[0] if len(logits) else 0, step):
        rows = (first, min(first + step, size[0]))
        probabilities = spec.restore(logits, size, rows).sigmoid()
        marked = probabilities > threshold
        area += marked.sum((1, 2))
        total += (probabilities * marked).sum((1, 2))
        masks[:, slice(*rows)] = marked.cpu()
    return Segments(text, masks, (total / area.clamp(min=1)).cpu())


def phrases_of(spec: SegmentSpec, question: str, text: str) -> list[str]:
    """What each mask of an answer shows, in words: the phrase that was asked for, where the question is in the words that `segment`
    asks with and the answer has one mask; else what the answer says before each mask."""
    said = text.split(spec.token)[:-1]
    before, _, behind = spec.question.partition("{phrase}")
    question = question.strip()
    if len(said) == 1 and question.startswith(before) and question.endswith(behind):
        return [question[len(before) : len(question) - len(behind)]]
    return [part.strip(" \n,.;:") for part in said]
