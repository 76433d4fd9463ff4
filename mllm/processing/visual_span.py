"""Which tokens stand for an image that the model itself draws?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mllm.config import StrictModel
from mllm.errors import AlignmentError
from mllm.types import ImageSpec

IGNORE = -100


class VisualSpan(StrictModel):
    """A drawn image in the token sequence: ``start``, placeholders where codes go, perhaps fixed tokens between them,
    ``end``. The model puts the codes into the placeholders; the processor never sees them."""

    image: ImageSpec
    """The pixels the visual tokenizer takes."""
    num_codes: int = Field(ge=1)
    """S: codes of one image, packed (`mllm.visual_tokenizers.sequence.pack_codes`)."""
    start: int
    end: int
    code: int
    """The placeholder's id."""
    runs: list[tuple[int, int]]
    """(id, how often), from ``start`` to ``end``."""
    names: list[str] = Field(default_factory=list)
    """Texts of the tokens of a span; typed by a user they stay text."""

    @property
    def length(self) -> int:
        """Tokens of one span."""
        return sum(count for _, count in self.runs)

    def ids(self) -> Tensor:
        """``(length,)`` int64."""
        return torch.tensor([token for token, count in self.runs for _ in range(count)], dtype=torch.long)

    def escape_tokens(self, text: str) -> str:
        """``text`` with a typed ``<image_start>`` pulled apart, so that it does not open an image."""
        for name in self.names:
            if name in text:
                text = text.replace(name, name[:1] + " " + name[1:])
        return text

    def insert(self, ids: Tensor, labels: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ids, labels ``(T,)`` with the tokens at ``places`` replaced by spans. A place whose label is -100 gets a span
        that is read and not learned."""
        if not len(places):
            return ids, labels
        span = self.ids()
        new_ids, new_labels, last = [], [], 0
        for place in places:
            learned = int(labels[place]) != IGNORE
            new_ids += [ids[last:place], span]
            new_labels += [labels[last:place], span if learned else torch.full_like(span, IGNORE)]
            last = place + 1
        return torch.cat([*new_ids, ids[last:]]), torch.cat([*new_labels, labels[last:]])

    def starts(self, ids: Tensor) -> list[int]:
        """Where spans start in ``(T,)``."""
        return (ids == self.start).nonzero().flatten().tolist()

    def before_cut(self, ids: Tensor, cut: int) -> int:
        """``cut``, or the start of the span that it would cut."""
        for start in self.starts(ids):
            if start < cut < start + self.length:
                return start
        return cut

    def check(self, ids: Tensor, num_images: int) -> None:
        """Raises `AlignmentError` unless ids ``(B, T)`` or ``(T,)`` hold ``num_images`` whole spans."""
        started, placed = int((ids == self.start).sum()), int((ids == self.code).sum())
        per_image = sum(count for token, count in self.runs if token == self.code)
        if started != num_images or placed != num_images * per_image:
            raise AlignmentError(
                f"{num_images} images to draw, {started} starts of an image and {placed} code placeholders "
                f"(one image has {per_image}); was the text made by this model's own processor and not cut inside an image?"
            )
