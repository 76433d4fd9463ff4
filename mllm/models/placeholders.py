"""Which placeholders have no picture to stand for?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm.errors import AlignmentError


def refuse_orphans(input_ids: Tensor | None, placeholder: int | None, cache: Any) -> None:
    """Placeholders without an image would be read as ordinary tokens: refuse them (all but single tokens after a cache, which are
    generated, and no placeholder ever is).

    Args:
        input_ids: ``(B, T)``, of a pass without images.
        placeholder: its id.
        cache: of earlier passes.

    Raises:
        AlignmentError: there are some.
    """
    if input_ids is None or torch.compiler.is_compiling() or (input_ids.shape[1] == 1 and cache is not None):
        return
    found = int((input_ids == placeholder).sum()) if placeholder is not None else 0
    if found:
        raise AlignmentError(f"{found} image placeholder tokens but no image was given (pixel_values is missing)")
