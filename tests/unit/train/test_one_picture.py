"""Do stages that learn from one picture a row refuse rows of several, of which they would see the first alone?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mllm.errors import DataError
from mllm.train.stages.contrastive.stage import PairProcessor
from mllm.train.stages.exits.stage import LabelReader
from mllm.train.stages.masked.stage import PictureReader
from mllm.train.stages.recognition.stage import TextReader
from mllm.types import ImageSpec, Sample, Turn

SPEC = ImageSpec(height=8, width=8, resize="squash")


def _reader(kind: type[Any]) -> Any:
    """A reader of which only the picture is asked."""
    reader = object.__new__(kind)
    vars(reader).update(
        name="eye", spec=SPEC, specs={"eye": SPEC}, pixel_key="eye", max_pixels=None, volumes=False, most=9, number_of={"cup": 0},
        inner=SimpleNamespace(tokenizer=lambda *_, **__: {"input_ids": []}),
        options=SimpleNamespace(size_of=lambda _: (8, 8), num_negatives=0),
    )  # fmt: skip
    return reader


@pytest.mark.parametrize(
    ("kind", "stage"),
    [(PairProcessor, "contrastive"), (LabelReader, "exits"), (PictureReader, "masked"), (TextReader, "recognition")],
)
def test_a_row_of_several_pictures_is_refused(kind: type[Any], stage: str) -> None:
    reader = _reader(kind)
    reader.inner.tokenizer.eos_token_id = 0
    pictures = [Image.new("RGB", (9, 8)), Image.new("RGB", (7, 6))]
    sample = Sample("s", [Turn("assistant", "cup")], pictures)
    with pytest.raises(DataError, match=rf"sample 's' of .*: 2 pictures, and an? {stage} stage learns from one a row"):
        reader.encode_sample(sample)
