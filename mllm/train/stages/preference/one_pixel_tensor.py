"""How do all pixels of a model pass through trainers that carry ``pixel_values``, one row a picture, and nothing else?

TRL's trainers hand the model the processor outputs that they know by name, and tell samples apart by counting rows. For the time of a
stage everything that a visual brings (the views and frames of each encoder, the picture's size, the frames' times) is one row of
``pixel_values`` ``(visuals, values)``, taken apart where the model begins. A video is decoded once, however many answers are drawn to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.errors import UnavailableError
from mllm.processing.frames import Chosen
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES
from mllm.processing.pixel_keys import PRIMARY_PIXELS
from mllm.processing.protocol import Processor
from mllm.types import Video, VisualLayout

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

_BASE, _DIGITS = 128, 4
"""Whole numbers travel among pixels as so many digits, which bfloat16 holds exactly; up to 268,435,455 (ms: three days)."""


@dataclass(frozen=True)
class ReadVideo(Video):
    """A video whose pixels are read already. chosen: its frames; pixels: encoder → ``(F, 3, H, W)``; size: (height, width)."""

    chosen: Any = None
    pixels: Mapping[str, Tensor] | None = None
    size: tuple[int, int] = (1, 1)

    def __deepcopy__(self, _: Any) -> ReadVideo:
        return self  # TRL copies the prompt for every answer


def read_video(video: Video, processor: Processor, where: str) -> ReadVideo:
    """A video with its frames decoded for all encoders. Raises `DataError` that opens with ``where``."""
    reader: Any = processor.image_processor
    seen = reader._seen(video, where)
    pixels, size = reader._video_pixels(seen, video, where)
    chosen = Chosen(seen.chosen.numbers, seen.chosen.seconds)
    return ReadVideo(video.source, fps=video.fps, chosen=chosen, pixels=pixels, size=size)


class OnePixelTensor:
    """``with OnePixelTensor(model, processor) as joined:`` – ``joined.processor`` gives one row of ``pixel_values`` a visual, which the
    model understands until the block ends. Pixels stay as they are for a model with one encoder that sees each picture once. Raises
    `UnavailableError` for a model whose router chooses encoders: the choice is part of the policy, and these trainers do not carry it."""

    def __init__(self, model: MllmForConditionalGeneration, processor: Processor):
        if model.config.router is not None:
            raise UnavailableError(
                "preference and reward stages are not offered for a model with a router: TRL does not carry its choices"
            )
        self.model, self.rules = model, processor.rules
        self.processor: Any = processor
        self.keys = dict(processor.pixel_keys)
        self.kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._joins = len(self.keys) > 1 or self.rules.needs_size or self.rules.video is not None
        self._handles: list[Any] = []

    def __enter__(self) -> OnePixelTensor:
        self.processor = _joining(self.processor, self)
        self.understood_by(self.model)
        return self

    def understood_by(self, model: MllmForConditionalGeneration | None) -> None:
        """Let one more model of the same kind (a reference) take the joined pixels; None is passed over."""
        if self._joins and model is not None:
            self._handles.append(model.model.register_forward_pre_hook(self._take_apart, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def join(self, data: Any) -> None:
        """Put all that a processor's output says of its visuals into one tensor, in place."""
        if not self._joins or not all(key in data for key in self.keys.values()):
            return
        sizes, times = data.pop(IMAGE_SIZES, None), data.pop(VIDEO_TIMES, None)
        pixels = {name: torch.as_tensor(data.pop(key)) for name, key in self.keys.items()}
        self.kinds = {name: (tuple(value.shape[1:]), value.dtype) for name, value in pixels.items()}
        layouts = self._layouts(sizes, times, len(next(iter(pixels.values()))))
        told = [torch.empty(len(layouts), 0, dtype=torch.long) if t is None else t for t in (sizes, times)]
        widths = torch.tensor([[part.shape[1] for part in told]]).expand(len(layouts), -1)
        head = _digits(torch.cat([widths, *told], dim=1))
        parts = {name: value.split([v.rows_of(name) for v in layouts]) for name, value in pixels.items()}
        rows = [torch.cat([parts[name][k].flatten().float() for name in pixels]) for k in range(len(layouts))]
        longest = max(map(len, rows), default=0)
        data[PRIMARY_PIXELS] = torch.cat(
            [head, torch.stack([pad(row, (0, longest - len(row))) for row in rows])], dim=1
        )

    def _layouts(self, sizes: Tensor | None, times: Tensor | None, rows: int) -> Sequence[VisualLayout]:
        told = times if times is not None else sizes
        return self.rules.layouts(sizes, rows if told is None else len(told), times)

    def _take_apart(self, _: Any, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        joined = inputs.get(PRIMARY_PIXELS)
        if not isinstance(joined, Tensor) or joined.dim() != 2:
            return arguments, inputs
        counts = _numbers(joined[:1, : 2 * _DIGITS])[0].tolist()
        begin = (2 + sum(counts)) * _DIGITS
        told = _numbers(joined[:, 2 * _DIGITS : begin]).split(counts, dim=1)
        sizes, times = (value if count else None for value, count in zip(told, counts))
        layouts = self._layouts(sizes, times, len(joined))
        parts: dict[str, list[Tensor]] = {name: [] for name in self.kinds}
        for row, layout in zip(joined, layouts, strict=True):
            at = begin
            for name, (shape, dtype) in self.kinds.items():
                one = torch.Size((layout.rows_of(name), *shape))
                parts[name].append(
                    row[at : at + one.numel()].view(one).to(dtype if not dtype.is_floating_point else row.dtype)
                )
                at += one.numel()
        pixels = {self.keys[name]: torch.cat(values) for name, values in parts.items()}
        beside = {key: value for key, value in ((IMAGE_SIZES, sizes), (VIDEO_TIMES, times)) if value is not None}
        return arguments, {**inputs, **pixels, **beside}


def _digits(numbers: Tensor) -> Tensor:
    """Whole numbers ``(B, n)`` as floats ``(B, n · digits)``; -1 (nothing) stays -1 in each."""
    powers = _BASE ** torch.arange(_DIGITS)
    found = numbers.unsqueeze(-1) // powers % _BASE
    return torch.where(numbers.unsqueeze(-1) < 0, -1, found).flatten(1).float()


def _numbers(digits: Tensor) -> Tensor:
    """What `_digits` wrote."""
    found = digits.unflatten(1, (-1, _DIGITS)).round().long()
    return torch.where(found[..., 0] < 0, -1, (found * _BASE ** torch.arange(_DIGITS, device=found.device)).sum(-1))


def _joining(processor: Any, joined: OnePixelTensor) -> Any:
    """A copy of a processor that gives one row of ``pixel_values`` a visual, and takes videos that are read already."""
    kind, reader = type(processor), type(processor.image_processor)

    class Reading(reader):
        def _seen(self, video: Video, where: str) -> Any:
            return video if isinstance(video, ReadVideo) else super()._seen(video, where)

        def _video_pixels(self, seen: Any, video: Video, where: str) -> Any:
            return (
                (seen.pixels, seen.size) if isinstance(seen, ReadVideo) else super()._video_pixels(seen, video, where)
            )

    class Joining(kind):
        def __call__(self, images: Any = None, *arguments: Any, **options: Any) -> Any:
            if isinstance(images, (list, tuple)):  # TRL writes None for a prompt of words beside one with pictures
                images = [[] if one is None else one for one in images]
            batch = super().__call__(images, *arguments, **options)
            joined.join(batch)
            return batch

    for own, published in ((Reading, reader), (Joining, kind)):  # what is saved names the published class
        own.__name__, own.__qualname__, own.__module__ = (
            published.__name__,
            published.__qualname__,
            published.__module__,
        )
    made = copy.copy(processor)
    made.__class__, made.image_processor = Joining, copy.copy(processor.image_processor)
    made.image_processor.__class__ = Reading
    return made
