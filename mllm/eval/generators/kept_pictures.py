"""Which pictures has this process encoded before, in whatever task? Their visual tokens are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm.heads.base import MultimodalModel
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES

_QUESTIONS = "router_input_ids"


class KeptPictures:
    """Visual tokens ``(M, L)`` by what they are made of: the pixels that every encoder sees, the picture's size, a video's times and,
    where the model's connector reads it, the question. At most ``megabytes`` of them stay in the host's memory; those longest unused
    go. A model with a router is left alone: its encoders depend on each question."""

    def __init__(self, megabytes: int):
        self._room, self._used = megabytes << 20, 0
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    @property
    def megabytes(self) -> float:
        """In use now."""
        return self._used / 2**20

    @staticmethod
    def fit(model: object) -> bool:
        """Whether it can work for a model: one of ours that sees pictures, without a router."""
        tower = getattr(getattr(model, "model", None), "vision_tower", None)
        return tower is not None and hasattr(getattr(model, "model", None), "encode_images") and not tower.experts

    def encode(self, model: MultimodalModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``generate``'s inputs with visual tokens in place of pixels; only pictures that are not kept are encoded."""
        body, left = model.model, dict(inputs)
        pixels = body.pixel_keys.pop(left)
        sizes, times = left.pop(IMAGE_SIZES, None), left.pop(VIDEO_TIMES, None)
        questions = left.pop(_QUESTIONS, None)
        left.pop("num_image_patches", None)
        if not pixels:
            return dict(inputs)
        layouts = body.visual_layouts(sizes, times)
        count = len(next(iter(pixels.values()))) if layouts is None else len(layouts)
        rows = {
            name: [1] * count if layouts is None else [layout.rows_of(name) for layout in layouts] for name in pixels
        }
        parts = {name: value.split(rows[name]) for name, value in pixels.items()}
        details = {IMAGE_SIZES: sizes, VIDEO_TIMES: times, _QUESTIONS: questions}
        keys = [_key({name: part[k] for name, part in parts.items()}, details, k) for k in range(count)]
        found = {key: kept for key in keys if (kept := self._get(key)) is not None}
        new = {key: k for k, key in reversed(list(enumerate(keys))) if key not in found}
        self.hits, self.misses = self.hits + count - len(new), self.misses + len(new)
        if new:
            chosen = sorted(new.values())
            tokens, _ = body.encode_images(
                {name: torch.cat([part[k] for k in chosen]) for name, part in parts.items()},
                **{name: value[chosen] for name, value in details.items() if value is not None},
            )
            each = None if layouts is None else [layouts[k].num_given for k in chosen]
            flat = tokens.reshape(-1, tokens.shape[-1])
            split = flat.split(len(flat) // len(chosen) if each is None else each)
            for k, part in zip(chosen, split, strict=True):
                found[keys[k]] = part
                self._put(keys[k], part)
        device = next(iter(pixels.values())).device
        told = {IMAGE_SIZES: sizes, VIDEO_TIMES: times}  # a language model with several position axes asks for them
        told = {name: value for name, value in told.items() if value is not None}
        return left | told | {"image_features": torch.cat([found[key].to(device) for key in keys])}

    def _get(self, key: bytes) -> Tensor | None:
        if key in self._tokens:
            self._tokens.move_to_end(key)
        return self._tokens.get(key)

    def _put(self, key: bytes, tokens: Tensor) -> None:
        kept = tokens.detach().to("cpu", copy=True)  # a part of a batch would hold the whole batch
        self._tokens[key] = kept
        self._used += kept.nbytes
        while self._used > self._room:
            _, gone = self._tokens.popitem(last=False)
            self._used -= gone.nbytes


def _key(pixels: Mapping[str, Tensor], details: Mapping[str, Tensor | None], k: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in pixels.items():
        digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for name, value in details.items():
        numbers = (
            [] if value is None else [number for number in value[k].tolist() if number >= 0]
        )  # the rest is padding
        digest.update(f"{name} {numbers};".encode())
    return digest.digest()
