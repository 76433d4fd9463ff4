"""Where does a picture's mask lie on what an encoder sees, and where does a predicted mask lie on the picture?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mllm.config import StrictModel
from mllm.errors import DataError
from mllm.processing.images import image_size
from mllm.processing.mask_files import IGNORE_PIXEL, read_mask
from mllm.processing.pixels import placed_at, resize
from mllm.types import IMAGE_MARK, ImageSpec, Turn


class ExampleSpec(StrictModel):
    """What a processor must know of a model that is shown another picture with its mask."""

    token: str
    """Stands in a question, behind its picture, for the mask."""
    token_id: int
    question: str
    """Asks for the same in a picture behind it."""


class SegmentSpec(StrictModel):
    """What a processor must know of a model that answers with masks."""

    token: str
    token_id: int
    image: ImageSpec
    """What the encoder sees that the masks are read from."""
    size: tuple[int, int] = Field()
    """(rows, columns) of the masks that it trains on: the encoder's input."""
    question: str
    """Asks for what ``{phrase}`` names."""
    example: ExampleSpec | None = None
    """None: questions show no masks."""

    def lay(self, mask: np.ndarray) -> Tensor:
        """A mask ``(height, width)`` of a picture → uint8 ``size`` on what the encoder sees of it; 255 beside the picture."""
        spec = self.image.model_copy(
            update={"height": self.size[0], "width": self.size[1], "interpolation": "nearest", "mean": (1.0, 1.0, 1.0)}
        )
        return torch.from_numpy(resize(Image.fromarray(mask).convert("RGB"), spec)[..., 0].copy())

    def check_question(self, text: str) -> None:
        """Raise `DataError` for a question that speaks of an example's mask, where none can be given: its token would be read as a word."""
        if self.example is not None and self.example.token in text:
            raise DataError(
                f"the question holds {self.example.token}, which stands for the mask of an example, and gives none; leave it out, and use "
                'model.segment(picture, example=(picture, mask)), or a server with "mask" beside the example\'s picture'
            )

    def restore(self, logits: Tensor, size: tuple[int, int], rows: tuple[int, int] | None = None) -> Tensor:
        """Logits ``(N, rows, columns)`` on what the encoder sees → ``(N, height, width)`` fp32 on its picture; rows: of these alone (first,
        behind the last)."""
        return restore(logits, (self.image.height, self.image.width), placed_at(size, self.image), size, rows)


def restore(
    logits: Tensor,
    square: tuple[int, int],
    placed: tuple[float, float, float, float],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Mask logits ``(N, rows, columns)`` → fp32 ``(N, height, width)`` of the picture, resampled twice as SAM does: to the encoder's
    input, then from where the picture lies there.

    square: (height, width) of the input; placed: (top, left, height, width) of the picture on it, which may reach beyond it (what
    the encoder did not see is no part of a mask). size: (height, width) of the picture; rows: (first, behind the last) of it that are
    wanted, default all.
    """
    values = F.interpolate(logits[:, None].float(), square, mode="bilinear", align_corners=False)
    top, left, height, width = placed
    seen, grids = [], []
    axes = ((top, height, size[0], square[0], rows or (0, size[0])), (left, width, size[1], square[1], (0, size[1])))
    for start, length, number, whole, wanted in axes:
        places = start + (torch.arange(*wanted, dtype=torch.float64) + 0.5) * (length / number)
        seen.append((places >= 0) & (places <= whole))
        places = places.clamp(max(start, 0) + 0.5, min(start + length, whole) - 0.5)
        grids.append((places * (2 / whole) - 1).float())
    grid = torch.stack(torch.meshgrid(*grids, indexing="ij")[::-1], -1).to(values.device)
    sampled = F.grid_sample(
        values, grid.expand(len(values), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )[:, 0]
    outside = ~(seen[0][:, None] & seen[1]).to(values.device)
    return sampled.masked_fill(outside, -torch.inf) if bool(outside.any()) else sampled


def encode_masks(
    spec: SegmentSpec, masks: Sequence[Any], pictures: Sequence[Any], owners: Sequence[int], *, where: str
) -> Tensor:
    """Masks of a sample as they are trained on, uint8 ``(K, rows, columns)``. owners: for each mask the number of its picture.

    Raises `DataError` naming the mask that cannot be read or has another size than its picture."""
    rows, sizes = [], {}
    for number, (entry, owner) in enumerate(zip(masks, owners)):
        if owner not in sizes:
            sizes[owner] = image_size(pictures[owner], where=where)
        rows.append(spec.lay(read_mask(entry, sizes[owner], where=f"{where}, mask {number}")))
    return torch.stack(rows)


def share_masks(
    spec: SegmentSpec, texts: Sequence[tuple[str, int, bool]], masks: Sequence[Any], *, where: str
) -> tuple[list[Any], list[int]]:
    """The masks that are learned and the picture of each.

    texts: every assistant turn's text, the number of pictures shown before it, and whether it is learned. Raises `DataError` where the
    marks and the masks differ in number, or a mask has no picture."""
    marks = [(shown, learn) for text, shown, learn in texts for _ in range(text.count(spec.token))]
    if len(marks) != len(masks):
        raise DataError(
            f"{where}: the answers hold {len(marks)} {spec.token} and the sample {len(masks)} masks; each has its own"
        )
    if any(shown == 0 for shown, _ in marks):
        raise DataError(f"{where}: {spec.token} stands before any picture; there is nothing to mark")
    kept = [(mask, shown - 1) for mask, (shown, learn) in zip(masks, marks) if learn]
    return [mask for mask, _ in kept], [owner for _, owner in kept]


def split_examples(
    spec: SegmentSpec, turns: Sequence[Turn], masks: Sequence[Any], *, where: str
) -> tuple[list[Any], list[Any], list[int]]:
    """A sample's masks, which lie in the order of their tokens in the whole conversation → those of answers, those that its questions
    show, and the number of the picture that each of the latter lies on. Raises `DataError` for one that is shown before any picture, and
    where there are fewer masks than tokens."""
    if spec.example is None:
        return list(masks), [], []
    answers: list[Any] = []
    shown: list[Any] = []
    owners: list[int] = []
    place, pictures = 0, 0
    for turn in turns:
        if turn.role == "assistant":
            number = turn.content.count(spec.token)
            answers += masks[place : place + number]
            place += number
            continue
        parts = turn.content.split(spec.example.token)
        for part in parts[:-1]:
            pictures += part.count(IMAGE_MARK)
            if pictures == 0:
                raise DataError(f"{where}: {spec.example.token} stands before any picture; write it behind its own")
            shown += masks[place : place + 1]
            owners.append(pictures - 1)
            place += 1
        pictures += parts[-1].count(IMAGE_MARK)
    if len(shown) != len(owners):
        raise DataError(
            f"{where}: the questions hold {len(owners)} {spec.example.token} and the sample {len(masks)} masks in all; each token has its "
            "own, in the order of the text"
        )
    return [*answers, *masks[place:]], shown, owners


__all__ = ["IGNORE_PIXEL", "ExampleSpec", "SegmentSpec", "encode_masks", "restore", "share_masks", "split_examples"]
