"""What did the model answer to questions about pictures, and what had it in mind at every word?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.heads.base import MultimodalModel
from mllm.processing.chat import encode_pixels, render_prompt
from mllm.processing.layout import IMAGE_SIZES, expand
from mllm.processing.protocol import Processor
from mllm.types import IMAGE_MARK, Turn

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass
class Answered:
    """B generated answers. ids ``(B, T)``: prompts, padded on the left, and answers; start: where answers begin; hidden ``(B, T, L)``;
    features: those of the encoders that heads read, by name; texts: the answers."""

    ids: Tensor
    start: int
    hidden: Tensor
    features: dict[str, Any]
    texts: list[str]

    @property
    def answers(self) -> Tensor:
        """``(B, T - start)``."""
        return self.ids[:, self.start :]


@torch.no_grad()
def answer(
    model: MultimodalModel,
    processor: Processor,
    pictures: Sequence[Any],
    questions: Sequence[str],
    options: dict[str, Any],
    *,
    before: Sequence[tuple[Any, str]] | None = None,
) -> Answered:
    """One question about each picture, answered by ``generate``; the encoders run once. options: as ``generate`` takes them; before:
    another picture that each question shows first, and what stands behind it."""
    rows, shown = [], []
    segments = getattr(processor, "segments", None)
    for number, (picture, question) in enumerate(zip(pictures, questions)):
        if segments is not None:
            segments.check_question(question)
        first = [] if before is None else [before[number][0]]
        said = "" if before is None else f"{IMAGE_MARK} {before[number][1]}\n"
        shown += [*first, picture]
        text = render_prompt(processor, [Turn("user", f"{said}{IMAGE_MARK}\n{question}")])
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        places = (ids == processor.image_token_id).nonzero().flatten().tolist()
        rows.append(expand(ids, places, processor.image_layouts([*first, picture], where=f"picture {number}"))[0])
    start = max(len(row) for row in rows)
    ids = torch.full((len(rows), start), processor.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, start - len(row) :], mask[number, start - len(row) :] = row, 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    pixels, beside = encode_pixels(processor, shown, where="pictures")
    by_name = {name: value.to(model.device) for name, value in model.model.pixel_keys.by_encoder(pixels).items()}
    features: dict[str, Any] = {}
    sizes = beside.get(IMAGE_SIZES)
    tokens, _ = model.model.encode_images(by_name, image_sizes=sizes, kept=features)
    seen: dict[str, Any] = {"image_features": tokens, **({} if sizes is None else {IMAGE_SIZES: sizes})}
    options = {"max_new_tokens": 64, "do_sample": False, **options, "return_dict_in_generate": False}
    output = model.generate(input_ids=ids, attention_mask=mask, **seen, **options)
    mask = torch.cat([mask, _until_end(output[:, start:], model.generation_config)], 1)
    hidden = model.model(input_ids=output, attention_mask=mask, use_cache=False, **seen).last_hidden_state
    texts = [processor.tokenizer.decode(row.tolist(), skip_special_tokens=True).strip() for row in output[:, start:]]
    return Answered(output, start, hidden, features, texts)


def _until_end(answers: Tensor, config: GenerationConfig) -> Tensor:
    """1 up to each answer's first end token, 0 behind it."""
    ends = config.eos_token_id
    ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=answers.dtype)
    ended = torch.isin(answers, ends.to(answers.device)).long()
    return (ended.cumsum(1) - ended == 0).long()
