"""What do stages share that make other samples of the same data: captions and near misses, or questions about experts?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.errors import DataError
from mllm.processing.chat import EncodedSample
from mllm.processing.images import load_image
from mllm.types import Block, Sample, VisualLayout


class WrappedProcessor:
    """A processor in a stage's data pipeline: reads text as ``inner`` does, and says by `encode_sample` what is learned."""

    image_tokens = 0
    """Placeholders of one image in what this processor reads."""

    def __init__(self, inner: Any):
        self.inner = inner

    def image_layouts(
        self, images: Sequence[Any], *, where: str = "sample", visual_tokens: int = 0
    ) -> list[VisualLayout]:
        """The tokens of every image of a list: always as many (`mllm.train.data` refuses a dataset's ``visual_tokens`` here)."""
        return [VisualLayout((Block(self.image_tokens, (1, 1, self.image_tokens)),))] * len(images)

    @property
    def layout_key(self) -> str:
        """Text that differs where the tokens of some image differ."""
        return str(self.image_tokens)

    @property
    def tokenizer(self) -> Any:
        return self.inner.tokenizer

    @property
    def chat_template(self) -> Any:
        return self.inner.chat_template

    @property
    def image_token(self) -> str:
        return self.inner.image_token

    @property
    def image_token_id(self) -> int:
        return self.inner.image_token_id

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """A sample as tensors. Raises `DataError` naming it when it cannot be used."""
        raise NotImplementedError


def one_picture(sample: Sample, stage: str, *, max_pixels: int | None) -> Any:
    """The picture of a sample that stands for one. stage: with its article, as "an exits". Raises `DataError` for a sample of several,
    of which all but the first would go unseen."""
    where = f"sample {sample.id!r} of {sample.dataset}"
    if len(sample.images) != 1:
        raise DataError(
            f"{where}: {len(sample.images)} pictures, and {stage} stage learns from one a row; write a row for each"
        )
    return load_image(sample.images[0], where=where, max_pixels=max_pixels)
