"""How are the codes of one image written, head by head, from one cache?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm.heads.base import MultimodalModel
from mllm.visual_tokenizers.next_scale import generate_next_scale
from mllm.visual_tokenizers.sampling import guide, sample


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn from logits."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float
    noise: SampleNoise
    changed: Tensor | None = None
    """Which codes ``(B, S)`` change, for a head with ``told_changes``; None: all."""

    def draw(self, logits: Tensor) -> Tensor:
        """Logits ``(R, V)``, R being B or, guided, 2B (with the text, then without) → ids ``(B,)``."""
        if self.guidance != 1.0:
            conditional, unconditional = logits.float().chunk(2)
            logits = guide(conditional, unconditional, self.guidance)
        uniform = self.noise.take(1)[:, 0]
        return sample(logits.float(), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, uniform=uniform)

    def repeated(self, inputs: Tensor) -> Tensor:
        """The same inputs for both branches of guidance."""
        return torch.cat([inputs, inputs]) if self.guidance != 1.0 else inputs

    def told(self, inputs: Tensor, head: Any, place: int) -> Tensor:
        """Inputs ``(R, L)`` before code number ``place``, told whether it changes where the head is told that."""
        if not getattr(head.config, "told_changes", False):
            return inputs
        number = len(self.noise.generators)
        here = torch.ones(number, device=inputs.device) if self.changed is None else self.changed[:, place]
        return inputs + self.repeated(head.told(here[:, None])[:, 0]).to(inputs)


class SampleNoise:
    """Uniform numbers from a generator per sample, so that what a sample draws does not depend on its batch."""

    def __init__(self, seeds: Iterable[int], device: Any):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def take(self, number: int) -> Tensor:
        """``(B, number)`` float64 in [0, 1)."""
        drawn = [torch.rand(number, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn).to(self.device)


class CachedDecoder:
    """The language model with its cache: embeddings in, last hidden states out."""

    def __init__(self, model: MultimodalModel, mask: Tensor):
        self.model, self.mask = model, mask
        self.cache: Any = DynamicCache(config=model.config.get_text_config())

    def __call__(self, inputs: Tensor, *, full: bool = False) -> Tensor:
        """inputs ``(R, n, L)`` → hidden states ``(R, n, L)``. full: the n inputs see one another."""
        rows, number = inputs.shape[:2]
        past = self.cache.get_seq_length()
        if past:
            self.mask = torch.cat([self.mask, self.mask.new_ones(rows, number)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -number:]
        mask: Tensor = self.mask
        if full:
            forbidden = torch.finfo(inputs.dtype).min * (mask == 0).to(inputs.dtype)
            mask = forbidden[:, None, None].expand(rows, 1, number, mask.shape[1])
        output = self.model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return output.last_hidden_state

    def forget(self, number: int) -> None:
        """Take the last ``number`` inputs out of the cache."""
        self.cache.crop(self.cache.get_seq_length() - number)
        self.mask = self.mask[:, : self.mask.shape[1] - number]


def _draw_separate(model: MultimodalModel, decoder: CachedDecoder, hidden: Tensor, drawing: Drawing) -> Tensor:
    head, tokenizer, codes = model.visual_head, model.image_tokenizer, []
    for block in head.blocks:
        for place in range(block.start, block.start + block.number):
            codes.append(drawing.draw(head.heads[block.book](hidden)))
            if place + 1 < head.num_codes:
                inputs = drawing.repeated(head.inputs(block, codes[-1][:, None], place, tokenizer)[:, 0])
                hidden = decoder(drawing.told(inputs, head, place + 1).to(hidden)[:, None])[:, -1]
    return torch.stack(codes, 1)


def _draw_vocabulary(model: MultimodalModel, decoder: CachedDecoder, hidden: Tensor, drawing: Drawing) -> Tensor:
    """Ids in the grammar's ranges; where only one id is allowed nothing is drawn."""
    grammar, codes = model.grammar, []
    reserved = {level.first: level.size for level in grammar.levels}
    total = model.image_tokenizer.tokens_per_image
    for low, high in grammar.ranges:
        is_code = reserved.get(low) == high - low and len(codes) < total
        if is_code:
            codes.append(drawing.draw(model.compute_logits(hidden)[:, low:high]))
            ids = codes[-1] + low
        else:
            ids = torch.full((len(drawing.noise.generators),), low, device=hidden.device)
        if len(codes) == total and is_code:
            break
        hidden = decoder(model.model.embed_tokens(drawing.repeated(ids[:, None])))[:, -1]
    return torch.stack(codes, 1)


def _draw_depth(model: MultimodalModel, decoder: CachedDecoder, hidden: Tensor, drawing: Drawing) -> Tensor:
    head, tokenizer, place = model.visual_head, model.image_tokenizer, 0
    found: dict[str, list[Tensor]] = {name: [] for name in head.books}
    for index, (number, names) in enumerate(head.groups):
        for _ in range(number):
            drawn = {}
            for name in names:
                depth = head.books[name][1]
                drawn[name] = head.heads[name].generate(
                    hidden,
                    partial(tokenizer.code_vectors, name),
                    guidance=drawing.guidance,
                    temperature=drawing.temperature,
                    top_k=drawing.top_k,
                    top_p=drawing.top_p,
                    uniform=drawing.noise.take(depth),
                )
                found[name].append(drawn[name])
            place += 1
            if place < head.num_steps:
                inputs = head.inputs(index, {n: ids[:, None] for n, ids in drawn.items()}, place - 1, tokenizer)
                hidden = decoder(drawing.repeated(inputs).to(hidden))[:, -1]
    return torch.cat([torch.stack(parts, 1).transpose(1, 2).flatten(1) for parts in found.values()], 1)


def _draw_next_scale(
    model: MultimodalModel,
    decoder: CachedDecoder,
    hidden: Tensor,
    drawing: Drawing,
    passes: Sequence[tuple[int, float]] | None,
) -> Tensor:
    head, tokenizer = model.visual_head, model.image_tokenizer

    def predict(index: int, slots: Tensor | None, commit: bool) -> tuple[Tensor, Tensor | None]:
        states = hidden[:, None]
        if slots is not None:
            inputs = head.inputs(slots, index)
            states = decoder(drawing.repeated(inputs).to(hidden), full=True)
            if not commit:
                decoder.forget(inputs.shape[1])
        logits = head.head(states).float()
        if drawing.guidance == 1.0:
            return logits, None
        conditional, unconditional = logits.chunk(2)
        return conditional, unconditional

    return generate_next_scale(
        predict,
        lambda ids: head.vectors(ids, tokenizer),
        head.scales,
        passes=passes or ((drawing.top_k, drawing.top_p),),
        guidance_offset=drawing.guidance - 1.0,
        temperature=drawing.temperature,
        uniform_of=drawing.noise.take,
    )


def draw_codes(
    model: MultimodalModel,
    decoder: CachedDecoder,
    hidden: Tensor,
    drawing: Drawing,
    passes: Sequence[tuple[int, float]] | None = None,
) -> Tensor:
    """Packed codes ``(B, S)`` of one image a sample, by the model's own head. hidden ``(R, L)``: the last state of the prompts;
    passes: (top_k, top_p) of each look at a scale (next_scale)."""
    kind = model.visual_config.type
    if kind == "next_scale":
        return _draw_next_scale(model, decoder, hidden, drawing, passes)
    draw = {"separate": _draw_separate, "vocabulary": _draw_vocabulary, "depth": _draw_depth}[kind]
    return draw(model, decoder, hidden, drawing)
