"""How does the model draw: prompts → codes → images, with guidance, from one cache?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.errors import ConfigError
from mllm.heads.base import MultimodalModel
from mllm.heads.codes.decoding import CachedDecoder, Drawing, SampleNoise, draw_codes
from mllm.heads.codes.targets import drop_text, evaluating, first_of_sample
from mllm.processing.chat import encode_pixels, encode_text, longest_conversation, render_prompt, split_images
from mllm.processing.layout import IMAGE_SIZES, expand
from mllm.processing.protocol import Processor, TextTokenizer
from mllm.processing.visual_span import VisualSpan
from mllm.types import IMAGE_MARK, Turn, VisualCodes
from mllm.visual_tokenizers.painting import Painting
from mllm.visual_tokenizers.sequence import code_blocks, decode_packed, unpack_codes


@dataclass
class GeneratedImages:
    """pixels ``(B, 3, H, W)`` in [0, 1]; packed ``(B, S)``: the codes in sequence order; codes: the same by codebook."""

    pixels: Tensor
    packed: Tensor
    codes: VisualCodes

    def pil(self) -> list[Image.Image]:
        """The images as RGB pictures."""
        return to_pil(self.pixels)


@dataclass
class InterleavedAnswer:
    """parts: text (str) and images (PIL) in the order in which they were generated; ids ``(T,)``: the generated tokens;
    packed: codes ``(S,)`` of each image."""

    parts: list[str | Image.Image]
    ids: Tensor
    packed: list[Tensor] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]


def sample_seeds(seed: int | Sequence[int] | None, number: int) -> list[int]:
    """A seed per sample: ``seed`` plus its place, or the given ones; None: fresh ones."""
    if seed is None:
        return [int(s) for s in torch.randint(0, 2**62, (number,))]
    if isinstance(seed, int):
        return [seed + place for place in range(number)]
    if len(seed) != number:
        raise ConfigError(f"seed: {len(seed)} seeds for {number} prompts; give one number, or one per prompt")
    return [int(s) for s in seed]


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """``(B, 3, H, W)`` in [0, 1] → RGB pictures."""
    array = (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in array]


def side_by_side(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows of ``columns`` (default: one row)."""
    columns = columns or len(pictures)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet


# Prompts ---------------------------------------------------------------------------------------------------------------


def as_turns(prompt: Any) -> list[Turn]:
    """A question (str) or a conversation (turns that end with the user's) as turns."""
    if isinstance(prompt, str):
        return [Turn("user", prompt)]
    turns = list(prompt)
    if not turns or turns[-1].role != "user":
        raise ConfigError("a prompt is a text, or turns of which the last one is the user's")
    return turns


def _need_head(model: MultimodalModel) -> None:
    if model.visual_config is None:
        raise ConfigError(
            "this model draws no images: none of its heads draws. Train one with model.visual_tokenizer and model.heads in the "
            "recipe (see recipes/unified_demo.yaml)"
        )


def _need_processor(processor: Processor | None) -> tuple[Processor, VisualSpan]:
    span = getattr(processor, "span", None)
    if processor is None or span is None:
        raise ConfigError(
            "processor: give this model's own processor (MllmProcessor.from_pretrained of the same folder), which knows how "
            "its images are written"
        )
    return processor, span


def prompt_prefix(processor: Processor, prompt: Any, where: str, images: Sequence[Any] = ()) -> Tensor:
    """Ids from the conversation's start to the start token of the image to draw, as training has them. images: those that
    the prompt shows."""
    turns = as_turns(prompt)
    layouts = processor.image_layouts(images, where=where)
    ids, _ = encode_text(processor, [*turns, Turn("assistant", IMAGE_MARK)], where=where, layouts=layouts)
    assert processor.span is not None  # a prompt to draw from is only asked for where something is drawn
    return ids[: processor.span.starts(ids)[-1] + 1]


def _left_pad(rows: Sequence[Tensor], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def prompt_embeddings(
    model: MultimodalModel,
    processor: Processor,
    prompts: Sequence[Any],
    images: Sequence[Sequence[Any]] | None,
    drawing: Drawing,
    negative: Any,
) -> tuple[Tensor, Tensor]:
    """Embeddings ``(R, T, L)`` and mask ``(R, T)`` of the prompts, up to the start token of what each is to draw; guided, R is 2B.

    Args:
        model: a model with a head that draws.
        processor: the model's own.
        prompts: texts, or conversations.
        images: the pictures that each shows.
        drawing: whether it is guided.
        negative: what guidance leads away from (None: the prompts without their text).

    Raises:
        ConfigError: a prompt with its drawing is longer than the model reads, or shows pictures in the assistant's turns.
    """
    device, tokens = model.device, model.visual_config.tokens
    shown = [list(given) for given in images] if images else [[] for _ in prompts]
    rows = [
        prompt_prefix(processor, prompt, f"prompt {number}", given)
        for number, (prompt, given) in enumerate(zip(prompts, shown))
    ]
    guided = drawing.guidance != 1.0
    if guided and negative is not None:
        rows += [prompt_prefix(processor, negative, "negative_prompt")] * len(prompts)
    assert processor.span is not None
    limit = longest_conversation(model.config.text_config)
    for number, row in enumerate(rows):
        if limit is not None and (needed := len(row) + processor.span.length - 1) > limit:
            name = f"prompt {number}" if number < len(prompts) else "negative_prompt"
            raise ConfigError(
                f"{name}: with its drawing it has {needed} tokens, and this model reads {limit}; shorten it"
            )
    ids, mask = _left_pad(rows, tokens["null"], device)
    if guided and negative is None:
        last = ids.shape[1] - 1
        starts = torch.tensor([[row, last] for row in range(len(ids))], device=device)
        without, _ = drop_text(
            ids, starts, first_of_sample(starts, mask, None), tokens["null"], model.is_visual(ids) | (mask == 0)
        )
        ids, mask = torch.cat([ids, without]), torch.cat([mask, mask])
    read, drawn = [], []
    for prompt, given in zip(prompts, shown):
        inputs, targets = split_images(as_turns(prompt), given, drawn=True)
        read, drawn = [*read, *inputs], [*drawn, *targets]
    if drawn:
        raise ConfigError(
            "generate_images: images in assistant turns of a prompt are not supported; ask with text and images"
        )
    embeddings = model.model.embed_tokens(ids)
    if model.visual_head.has_weights:
        embeddings[:, -1] = drawing.told(model.visual_head.start(embeddings[:, -1]), model.visual_head, 0)
    if read:
        pixels, beside = encode_pixels(processor, read, where="generate_images")
        by_name = {name: value.to(device) for name, value in model.model.pixel_keys.by_encoder(pixels).items()}
        features, _ = model.model.encode_images(by_name, image_sizes=beside.get(IMAGE_SIZES))
        if guided and negative is None:
            features = torch.cat([features, features])
        embeddings = model.model.merge_images(ids, embeddings, features)
    return embeddings, mask


@torch.no_grad()
def generate_images(
    model: MultimodalModel,
    prompts: Any,
    *,
    processor: Processor | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] | None = None,
    negative_prompt: Any = None,
    passes: Sequence[tuple[int, float]] | None = None,
    batch_size: int | None = None,
    painting: Painting | None = None,
    changed: Tensor | None = None,
) -> GeneratedImages:
    """One image per prompt.

    Guided, both branches run in one batch with one cache. A next_scale head reaches its guidance at the last scale, from 1 at the first
    (TokenFlow). Sample k draws from a generator of its own, whatever the batch.

    Args:
        model: a model with a head that draws.
        prompts: texts, or conversations (lists of `Turn`).
        processor: the model's own.
        images: the pictures that each prompt shows, one list per prompt.
        cfg_scale: guidance s; logits are ``u + s (c - u)``, u from the same prompt with its text taken out (or from ``negative_prompt``);
            1 is no guidance, and half the work.
        temperature: 0 takes the most likely code.
        top_k: as in `filter_logits`.
        top_p: as in `filter_logits`.
        seed: of sample k, ``seed + k``; or one for each.
        negative_prompt: what guidance leads away from, as a prompt.
        passes: (top_k, top_p) of each look at a scale (next_scale).
        batch_size: most prompts at once (default: all).
        painting: by which decoder codes become pixels; default: the diffusion decoder where the checkpoint has one, else the plain one.
        changed: which codes ``(B, S)`` change, of pictures that are edited; read by a head with ``told_changes``. Default: all.

    Returns:
        Pixels ``(B, 3, H, W)`` in [0, 1], and the codes.

    Raises:
        ConfigError: the model draws nothing, the processor is another model's, or options do not fit its head.
    """
    _need_head(model)
    own, _ = _need_processor(processor)
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ConfigError("prompts is empty: nothing to draw")
    if images is not None and len(images) != len(prompts):
        raise ConfigError(f"images: {len(images)} lists of pictures for {len(prompts)} prompts")
    if passes is not None and model.visual_config.type != "next_scale":
        raise ConfigError(
            f"passes: only a next_scale head looks at a scale again; this one is {model.visual_config.type}"
        )
    painting = painting or Painting()
    painting.by_diffusion(model.image_tokenizer)  # what it refuses is told before anything is drawn
    seeds, parts = sample_seeds(seed, len(prompts)), []
    size = batch_size or len(prompts)
    with evaluating(model):
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            told = None if changed is None else changed[part].to(model.device)
            drawing = Drawing(cfg_scale, temperature, top_k, top_p, SampleNoise(seeds[part], model.device), told)
            given = None if images is None else images[part]
            embeddings, mask = prompt_embeddings(model, own, prompts[part], given, drawing, negative_prompt)
            decoder = CachedDecoder(model, mask)
            hidden = decoder(embeddings)[:, -1]
            parts.append(draw_codes(model, decoder, hidden, drawing, passes))
        packed = torch.cat(parts)
        chunks = [slice(start, start + size) for start in range(0, len(packed), size)]
        pixels = torch.cat([decode_packed(model.image_tokenizer, packed[c], painting, seeds[c]) for c in chunks])
    return GeneratedImages(pixels, packed, unpack_codes(model.image_tokenizer, packed))


@torch.no_grad()
# Text and images -------------------------------------------------------------------------------------------------------


def read_interleaved(model: MultimodalModel, tokenizer: TextTokenizer, ids: Tensor) -> InterleavedAnswer:
    """Generated ids ``(T,)`` of a vocabulary head → text parts and images. Raises `AlignmentError` for an image that is
    cut or breaks the grammar, with its position."""
    grammar, blocks = model.grammar, code_blocks(model.image_tokenizer)
    found = grammar.read(ids.cpu())
    packed = [torch.cat([image[block.name] for block in blocks]) for image in found]
    pictures: list[Image.Image] = []
    if packed:
        whole = torch.stack(packed).to(model.device)
        pictures = to_pil(decode_packed(model.image_tokenizer, whole, Painting(), range(len(packed))))
    parts: list[str | Image.Image] = []
    last = 0
    starts = (ids == grammar.start_of_image).nonzero().flatten().tolist()
    for start, picture in zip(starts, pictures):
        parts += [_text(tokenizer, ids[last:start]), picture]
        last = start + grammar.length
    parts.append(_text(tokenizer, ids[last:]))
    return InterleavedAnswer([part for part in parts if not isinstance(part, str) or part], ids, packed)


def _text(tokenizer: TextTokenizer, ids: Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)


@torch.no_grad()
def generate_interleaved(
    model: MultimodalModel,
    prompts: Any,
    *,
    processor: Processor | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    max_new_tokens: int = 1024,
    **options: Any,
) -> list[InterleavedAnswer]:
    """Answers that hold text and images as the model chooses: ``generate`` with the image grammar enforced for every sample. Needs a
    vocabulary head, whose images are ids like any others.

    Args:
        model: a model with a vocabulary head.
        prompts: texts, or conversations (lists of `Turn`).
        processor: the model's own.
        images: the pictures that each prompt shows, one list per prompt.
        max_new_tokens: most tokens of an answer, those of images included.
        options: as ``generate`` takes them.

    Returns:
        One answer a prompt: texts and pictures in order, ids and codes.

    Raises:
        AlignmentError: ``max_new_tokens`` ends inside an image.
        ConfigError: another kind of head, a processor of another model, or pictures in a prompt's assistant turns.
    """
    _need_head(model)
    own, span = _need_processor(processor)
    if model.visual_head.has_weights:
        raise ConfigError(
            f"generate_interleaved needs a vocabulary head, this one is {model.visual_config.type}; ask for text with "
            "generate and for images with generate_images"
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows, read = [], []
    for number, prompt in enumerate(prompts):
        turns = [replace(t, content=span.escape_tokens(t.content)) for t in as_turns(prompt)]
        inputs, targets = split_images(turns, list(images[number]) if images is not None else [], drawn=True)
        if targets:
            raise ConfigError("generate_interleaved: images in assistant turns of a prompt are not supported")
        read += inputs
        ids = own.tokenizer(render_prompt(own, turns), add_special_tokens=False, return_tensors="pt")
        ids = ids["input_ids"][0]
        places = (ids == own.image_token_id).nonzero().flatten().tolist()
        rows.append(expand(ids, places, own.image_layouts(inputs, where=f"prompt {number}"))[0])
    ids, mask = _left_pad(rows, own.tokenizer.pad_token_id, model.device)
    pixels = {}
    if read:
        given, beside = encode_pixels(own, read, where="prompts")
        given |= {IMAGE_SIZES: beside[IMAGE_SIZES]} if IMAGE_SIZES in beside else {}
        pixels = {k: v.to(model.device) for k, v in given.items()}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=False,
        **pixels,
        **options,
    )
    return [read_interleaved(model, own.tokenizer, row[ids.shape[1] :]) for row in output]
