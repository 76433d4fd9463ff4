"""How is an image given by codes that were computed before, instead of by its pixels?"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.errors import CheckpointError, DataError, MissingFile
from mllm.references import CODES
from mllm.types import VisualCodes


def read_codes(image: Any, *, where: str, source: str | None = None) -> Tensor | None:
    """Packed codes ``(S,)`` int64 of an image that is given by them; None for any other image.

    image: ``folder/codes.json#12`` (image 12 of a folder that ``mllm tokenizer encode`` wrote), or `VisualCodes` of one
    image, or a 1-D tensor of packed codes. source: fingerprint of the tokenizer the codes must be from. Raises
    `DataError` naming the image.
    """
    if isinstance(image, VisualCodes):
        packed = torch.cat([ids.transpose(1, 2).flatten(1) for ids in image.codes.values()], 1)
        if len(packed) != 1:
            raise DataError(f"{where}: codes of {len(packed)} images where one image is expected")
        return packed[0].long()
    if isinstance(image, Tensor) and image.dim() == 1 and not image.is_floating_point():
        return image.long()
    found = CODES.match(image) if isinstance(image, str) else None
    if found is None:
        return None
    folder, row = found.group(1) or ".", int(found.group(2))
    try:
        stored = _open(folder)
    except CheckpointError as error:
        kind = DataError if (Path(folder) / "codes.json").is_file() else MissingFile
        raise kind(f"{where}: {error}") from error
    if source is not None and stored.index["tokenizer"] != source:
        raise DataError(
            f"{where}: {folder} holds codes of another tokenizer than the model's; encode the images again "
            "(mllm tokenizer encode)"
        )
    if row >= len(stored):
        raise DataError(f"{where}: {folder} holds the codes of {len(stored)} images; there is no number {row}")
    return read_codes(stored[row], where=where)


@lru_cache(maxsize=64)
def _open(folder: str) -> Any:
    from mllm.visual_tokenizers.storage import StoredCodes

    return StoredCodes(Path(folder))
