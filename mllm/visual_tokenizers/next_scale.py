"""How does a language model draw scale by scale: inputs, attention mask and the drawing loop?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mllm.errors import AlignmentError
from mllm.visual_tokenizers.quantizers.multi_scale import enlarge
from mllm.visual_tokenizers.sampling import guide, next_scale_guidance, sample

VectorsOf = Callable[[Tensor], Tensor]
"""Code ids ``(B, n)`` → their vectors ``(B, n, C)``."""


def _map(tokens: Tensor, side: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _resize(maps: Tensor, side: int) -> Tensor:
    return enlarge(maps, side)


def split_scales(codes: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """``(B, sum(s²), …)`` → one tensor per scale. Raises `AlignmentError` for another length."""
    sizes = [s * s for s in scales]
    if codes.shape[1] != sum(sizes):
        raise AlignmentError(f"scales {tuple(scales)} have {sum(sizes)} codes, the sequence has {codes.shape[1]}")
    return list(codes.split(sizes, dim=1))


def next_scale_inputs(
    codes: Tensor, vectors_of: VectorsOf, scales: Sequence[int], *, same_scale: int | None = None
) -> Tensor:
    """What the model reads where it predicts scales 1 … S-1 (TokenFlow): codes ``(B, sum(s²))`` → ``(B, sum of s²
    from 1, C)``.

    Slots of scale i+1 hold the picture after scale i, resized (bicubic). The picture grows at each scale's own
    resolution, which is not the direct sum that decoding uses; both are as published. same_scale k: slots of scale
    k+1 hold that scale's own picture instead, its codes included (the second look of multi-step sampling).
    """
    parts = split_scales(codes, scales)
    picture = _map(vectors_of(parts[0]), scales[0])
    slots = []
    for index in range(len(scales) - 1):
        side = scales[index + 1]
        grown = _resize(picture, side)
        picture = grown + _map(vectors_of(parts[index + 1]), side)
        slots.append(_tokens(picture if index == same_scale else grown))
    return torch.cat(slots, 1)


def decode_sum(codes: Tensor, vectors_of: VectorsOf, scales: Sequence[int]) -> Tensor:
    """The feature map ``(B, C, S, S)`` that is decoded: every scale resized straight to the last one, summed."""
    parts = split_scales(codes, scales)
    maps = [_resize(_map(vectors_of(part), side), scales[-1]) for side, part in zip(scales, parts)]
    return torch.stack(maps).sum(0)


def next_scale_mask(keep: Tensor, image_start: Tensor, scales: Sequence[int]) -> Tensor:
    """Which key (column) each query (row) sees, bool ``(B, T, T)``: causal, padded keys hidden; inside the image
    full within a scale and causal across scales.

    keep ``(B, T)``: 1 = real token; image_start ``(B,)``: index of the first image id. The image block lies one
    position earlier, where its ids are predicted.
    """
    length = keep.shape[1]
    total = sum(s * s for s in scales)
    first = image_start - 1
    if int(first.min()) < 0 or int(first.max()) + total > length:
        raise AlignmentError(f"an image of {total} codes does not fit: starts {image_start.tolist()}, length {length}")
    visible = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril() & keep.bool()[:, None, :]
    level = torch.cat([torch.full((s * s,), i, device=keep.device) for i, s in enumerate(scales)])
    position = torch.arange(length, device=keep.device) - first[:, None]
    inside = (position >= 0) & (position < total)
    of = level[position.clamp(0, total - 1)]
    block = inside[:, :, None] & inside[:, None, :]
    return torch.where(block, of[:, :, None] >= of[:, None, :], visible)


class Predict(Protocol):
    """The model's side of `generate_next_scale`."""

    def __call__(self, index: int, slots: Tensor | None, commit: bool) -> tuple[Tensor, Tensor | None]:
        """Logits ``(B, s², V)`` of scale ``index`` with and without the text (None: no guidance).

        slots ``(B, s², C)``: this scale's inputs; None for scale 0, which the last prompt token predicts. commit:
        keep this pass in the cache; a second look at the same scale must not be kept.
        """
        ...


@torch.no_grad()
def generate_next_scale(
    predict: Predict,
    vectors_of: VectorsOf,
    scales: Sequence[int],
    *,
    passes: Sequence[tuple[int, float]] = ((600, 0.6),),
    guidance_offset: float = 7.5,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniform_of: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Draw all codes ``(B, sum(s²))``. passes: (top_k, top_p) of each look at a scale; the published schedules are
    ``((600, .6),)``, ``((1200, .8), (1, 0))`` and ``((1200, .8), (100, .8), (1, 0))``. Scale 0 gets the first one only.

    guidance_offset: TokenFlow's t, reached at the last scale (`next_scale_guidance`). uniform_of: number of
    codes n → ``(B, n)`` numbers to draw with (see `sample`), in place of ``generator``.
    """
    drawn: list[Tensor] = []
    picture: Tensor | None = None
    for index, side in enumerate(scales):
        grown = None if picture is None else _resize(picture, side)
        slots = None if grown is None else _tokens(grown)
        ids = torch.empty(0, dtype=torch.int64)
        for look, (top_k, top_p) in enumerate(passes if index else passes[:1]):
            conditional, unconditional = predict(index, slots, look == 0)
            logits = conditional
            if unconditional is not None:
                scale = next_scale_guidance(guidance_offset, index, len(scales))
                logits = guide(conditional, unconditional, scale)
            uniform = None if uniform_of is None else uniform_of(side * side)
            ids = sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, uniform=uniform
            )
            own = _map(vectors_of(ids), side)
            picture = own if grown is None else grown + own
            slots = _tokens(picture)
        drawn.append(ids)
    return torch.cat(drawn, 1)
