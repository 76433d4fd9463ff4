"""How does the model mark what a phrase names: ask, read the answer, decode its masks, lay them on the picture?"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.errors import ConfigError
from mllm.processing.chat import encode_pixels, render_prompt
from mllm.processing.images import image_size, load_image
from mllm.processing.layout import IMAGE_SIZES, expand
from mllm.processing.mask_files import box_of, encode_rle, outlines
from mllm.types import IMAGE_MARK, Turn

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

    config: Any
    model: Any
    heads: Any
    device: Any

    def segment(
        self,
        images: Any,
        phrases: str | Sequence[str] | None = None,
        *,
        questions: str | Sequence[str] | None = None,
        processor: Any = None,
        threshold: float = 0.5,
        **options: Any,
    ) -> Any:
        """Mark what phrases name in pictures.

        images: a picture or a list (paths, PIL, arrays, bytes); phrases: what to mark in each, one for all or one each, asked for in the
        words the model was trained with; questions: the whole question in place of a phrase. processor: the model's own (default: the
        one saved beside it). threshold: probability from which a pixel is marked. options: as `generate` takes them.

        Returns `Segments`, a list of them for a list of pictures. Raises `ConfigError` for a model that marks nothing.
        """
        alone = not isinstance(images, (list, tuple))
        pictures = [images] if alone else list(images)
        processor, name = _own_processor(self, processor), _segmentation_head(self)
        asked = _questions(processor, phrases, questions, len(pictures))
        found = _segment(self, self.heads[name], processor, pictures, asked, threshold, options)
        return found[0] if alone else found


def _segmentation_head(model: Any) -> str:
    from mllm.heads.segmentation.build import segmentation_heads

    names = segmentation_heads(model.config.heads)
    if not names:
        raise ConfigError(
            "this model marks nothing: none of its heads is of type segmentation. Train one with model.heads in the recipe (see "
            "recipes/segmentation_demo.yaml)"
        )
    return names[0]


def _own_processor(model: Any, processor: Any) -> Any:
    if processor is None and model.name_or_path:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model.name_or_path)
    if processor is None or getattr(processor, "segments", None) is None:
        raise ConfigError(
            "processor: give this model's own processor (AutoProcessor.from_pretrained of the same folder), which knows how its "
            "masks lie"
        )
    return processor


def _questions(processor: Any, phrases: Any, questions: Any, number: int) -> list[str]:
    if (phrases is None) == (questions is None):
        raise ConfigError("segment: give phrases (what to mark) or questions (the whole question), one of the two")
    given = phrases if questions is None else questions
    given = [given] * number if isinstance(given, str) else list(given)
    if len(given) != number:
        raise ConfigError(f"segment: {len(given)} phrases for {number} pictures; give one for all, or one each")
    return given if phrases is None else [processor.segments.question.format(phrase=phrase) for phrase in given]


@torch.no_grad()
def _segment(
    model: Any,
    head: Any,
    processor: Any,
    pictures: Sequence[Any],
    questions: Sequence[str],
    threshold: float,
    options: dict[str, Any],
) -> list[Segments]:
    rows = []
    for number, (picture, question) in enumerate(zip(pictures, questions)):
        text = render_prompt(processor, [Turn("user", f"{IMAGE_MARK}\n{question}")])
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        places = (ids == processor.image_token_id).nonzero().flatten().tolist()
        rows.append(expand(ids, places, processor.image_layouts([picture], where=f"picture {number}"))[0])
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), processor.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    pixels, beside = encode_pixels(processor, pictures, where="segment")
    by_name = {name: value.to(model.device) for name, value in model.model.pixel_keys.by_encoder(pixels).items()}
    features: dict[str, Any] = {}
    tokens, _ = model.model.encode_images(by_name, image_sizes=beside.get(IMAGE_SIZES), kept=features)
    options = {"max_new_tokens": 64, "do_sample": False, **options, "return_dict_in_generate": False}
    output = model.generate(input_ids=ids, attention_mask=mask, image_features=tokens, **options)
    answers = output[:, longest:]
    mask = torch.cat([mask, _until_end(answers, model.generation_config)], 1)
    hidden = model.model(
        input_ids=output, attention_mask=mask, image_features=tokens, use_cache=False
    ).last_hidden_state
    marks = (answers == head.config.tokens["mark"]).nonzero() + answers.new_tensor([0, longest])
    logits = head.predict(hidden, head.places(marks), marks[:, 0], features[head.config.encoder])
    found = []
    for number, picture in enumerate(pictures):
        size = image_size(load_image(picture, where=f"picture {number}"), where=f"picture {number}")
        probabilities = processor.segments.restore(logits[marks[:, 0] == number], size).sigmoid()
        masks = probabilities > threshold
        area = masks.sum((1, 2))
        scores = (probabilities * masks).sum((1, 2)) / area.clamp(min=1)
        text = processor.tokenizer.decode(answers[number].tolist(), skip_special_tokens=True)
        found.append(Segments(text.strip(), masks.cpu(), scores.cpu()))
    return found


def _until_end(answers: Tensor, config: Any) -> Tensor:
    """1 up to each answer's first end token, 0 behind it."""
    ends = config.eos_token_id
    ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=answers.dtype)
    ended = torch.isin(answers, ends.to(answers.device)).long().cumsum(1)
    return (ended - torch.isin(answers, ends.to(answers.device)).long() == 0).long()
