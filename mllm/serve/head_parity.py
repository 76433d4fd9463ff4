"""Do a checkpoint's heads answer the same alone, together, with its adapter merged, and in vLLM: masks, probabilities, edited pictures?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mllm.heads.build import drawing_head, head_configs
from mllm.heads.editing import edit_pictures, side_of
from mllm.processing.images import load_image
from mllm.processing.mask_files import decode_rle
from mllm.processing.protocol import Processor
from mllm.serve.heads import KEY, served_heads
from mllm.serve.traces import Case, Difference, lora_request, vllm_messages
from mllm.types import IMAGE_MARK, Turn, Video

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

CLOSE = 1e-4
"""By so much a probability or a score may differ in float32."""
PHRASES = ("the thing", "the left one", "the red square")
HEAD = "head "
"""Before a head's name, where it stands among encoders."""
OWN = "own pictures"
"""Id of the case of the pictures and the question that a user gives."""
TOKENS = 64
"""Of an answer, at most."""


@dataclass
class HeadAnswer:
    """What the heads said of a case.

    text: the answer; masks: one for each mask token, as `Segments.records` has it (None where it is not known); None for a model that marks
    nothing; probability: word → share, None where the answer names no class; edited ``(3, H, W)`` in [0, 1], None for a model that edits
    nothing.
    """

    text: str
    masks: list[dict[str, Any] | None] | None = None
    probability: dict[str, float] | None = None
    edited: torch.Tensor | None = None


def head_cases(model: MllmForConditionalGeneration, processor: Processor, cases: Sequence[Case]) -> list[Case]:
    """What the heads of a model are asked: each case's first picture, in the words of the segmentation head; own pictures all, in
    their own words too. Empty for a model without a head that answers."""
    served = served_heads(model.config.heads)
    asked: list[Case] = []
    if served is None:
        return asked
    for case in cases:
        own = case.turns[-1].content.replace(IMAGE_MARK, "").strip()
        questions = [own] if case.id == OWN or served.mark is None else []
        stills = [image for image in case.images if not isinstance(image, Video)]
        for number, picture in enumerate(stills if case.id == OWN else stills[:1]):
            phrase = PHRASES[len(asked) % len(PHRASES)]
            marked = [] if served.mark is None else [processor.segments.question.format(phrase=phrase)]  # type: ignore[attr-defined]
            for question in [*questions, *marked]:
                name = f"heads, {case.id.split(':')[0]}, picture {number}: {question}"
                asked.append(Case(name, [Turn("user", f"{IMAGE_MARK}\n{question}")], [picture]))
    return asked


def answered(model: MllmForConditionalGeneration, known: Sequence[HeadAnswer]) -> dict[str, float]:
    """`HEAD` and a head's name → how many cases it answers; where that is none, nothing here tests it."""
    counts = {}
    for name, config in head_configs(model.config.heads).items():
        if config.type == "segmentation":
            counts[HEAD + name] = float(sum(bool(one.masks) for one in known))
        elif config.type == "probability":
            counts[HEAD + name] = float(sum(one.probability is not None for one in known))
    return counts


@torch.no_grad()
def model_heads(
    model: MllmForConditionalGeneration,
    processor: Processor,
    cases: Sequence[Case],
    *,
    num_tokens: int = TOKENS,
    together: bool = False,
) -> list[HeadAnswer]:
    """What the model says by `segment`, `probability` and `edit_pictures`, one by one or all ``together``."""
    served = served_heads(model.config.heads)
    if served is None or not cases:
        return []
    pictures, questions = [case.images[0] for case in cases], [_question(case) for case in cases]
    found: list[HeadAnswer] = []
    for start in range(0, len(cases), len(cases) if together else 1):
        part = slice(start, start + (len(cases) if together else 1))
        found += _said(model, processor, pictures[part], questions[part], served.mark is not None, num_tokens)
    if served.mark is not None and drawing_head(model.config.heads) is not None:
        side = side_of(model)
        squares = [load_image(p, where=c.id).convert("RGB").resize((side, side)) for p, c in zip(pictures, cases)]
        masks = torch.zeros(len(cases), side, side, dtype=torch.bool)
        masks[:, side // 4 : side // 2, side // 4 : side // 2] = True
        parts = [slice(None)] if together else [slice(k, k + 1) for k in range(len(cases))]
        made = [
            one
            for part in parts
            for one in edit_pictures(model, squares[part], questions[part], processor=processor, masks=masks[part])
        ]
        for answer, one in zip(found, made, strict=True):
            answer.edited = one.pixels.cpu()
    return found


def _said(
    model: Any, processor: Processor, pictures: list[Any], questions: list[str], marks: bool, num_tokens: int
) -> list[HeadAnswer]:
    texts, masks = [""] * len(pictures), [None] * len(pictures)
    if marks:
        segments = model.segment(pictures, questions=questions, processor=processor, max_new_tokens=num_tokens)
        texts = [one.text for one in segments]
        masks = [one.records(processor.segments, question) for one, question in zip(segments, questions)]  # type: ignore[attr-defined]
    shares: list[Any] = [None] * len(pictures)
    if served_heads(model.config.heads).probability:  # type: ignore[union-attr]
        for number, (picture, question) in enumerate(zip(pictures, questions)):
            sure = model.probability(picture, question, processor=processor, max_new_tokens=num_tokens)
            shares[number], texts[number] = sure.probabilities, texts[number] or sure.text
    return [HeadAnswer(*each) for each in zip(texts, masks, shares)]


def vllm_heads(
    llm: Any, cases: Sequence[Case], *, num_tokens: int = TOKENS, batch: bool = False, adapter: str | None = None
) -> list[HeadAnswer]:
    """What the heads say in the engine's process of what vLLM writes, as a server asks them. llm: of `open_vllm`; batch: all
    at once; adapter: folder of a LoRA adapter, applied unmerged."""
    from vllm import SamplingParams

    found: list[HeadAnswer] = []
    groups = [range(len(cases))] if batch else [[number] for number in range(len(cases))]
    for numbers in groups:
        keys = [f"parity-{batch}-{number}" for number in numbers]
        sampling = [SamplingParams(temperature=0, max_tokens=num_tokens, extra_args={KEY: key}) for key in keys]
        outputs = llm.chat(
            [vllm_messages(cases[number]) for number in numbers],
            sampling,
            use_tqdm=False,
            lora_request=lora_request(adapter),
            chat_template_content_format="openai",
        )
        for number, key, output in zip(numbers, keys, outputs, strict=True):
            text, case = output.outputs[0].text, cases[number]
            request = {"key": key, "text": text, "question": _question(case), "picture": _png(case.images[0])}
            (said,) = llm.collective_rpc("head_answers", args=(request,))
            said = said or {}
            found.append(HeadAnswer(text.strip(), said.get("masks"), said.get("probability")))
    return found


def compare_heads(
    cases: Sequence[Case], known: Sequence[HeadAnswer], found: Sequence[HeadAnswer], *, path: str
) -> list[Difference]:
    """Every case of a path against what the model's own heads say, asked one by one. The same are equal words, masks to the pixel,
    scores and probabilities to `CLOSE`, edited pictures to one step of 255."""
    return [_compared(case, one, other, path) for case, one, other in zip(cases, known, found, strict=True)]


def _compared(case: Case, known: HeadAnswer, other: HeadAnswer, path: str) -> Difference:
    notes, gap = [], 0.0
    if known.text != other.text:
        notes.append(f"words: {other.text!r}, and {known.text!r} of the model")
    first, second = known.masks or [], other.masks or []
    if len(first) != len(second):
        notes.append(f"{len(second)} masks, and {len(first)} of the model")
    for number, (one, two) in enumerate(zip(first, second)):
        if one is None or two is None:
            notes += [f"mask {number} is not known"] if one is not two else []
            continue
        pixels = int((decode_rle(one["rle"]) != decode_rle(two["rle"])).sum())
        notes += [f"mask {number}: {pixels} pixels"] if pixels else []
        gap = max(gap, abs(one["score"] - two["score"]))
    if (known.probability is None) != (other.probability is None):
        notes.append("a probability on one side alone")
    elif known.probability is not None and other.probability is not None:
        gap = max([gap, *(abs(share - other.probability[word]) for word, share in known.probability.items())])
    if gap > CLOSE:
        notes.append(f"a score or probability by {gap:.1e}")
    if known.edited is not None and other.edited is not None:
        off = float((known.edited - other.edited).abs().max())
        notes += [f"the edited picture by {255 * off:.1f} of 255"] if off > 1 / 255 else []
    return Difference(case.id, path, 0, None, gap, notes)


def _question(case: Case) -> str:
    return case.turns[-1].content.replace(IMAGE_MARK, "").strip()


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(load_image(picture, where="picture").convert("RGB"))).save(file, "PNG")
    return file.getvalue()
