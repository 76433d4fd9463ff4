"""Which picture of a batch does a token of its text speak of?"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.heads.base import HeadModel


def pictures_before(
    model: HeadModel, input_ids: Tensor, places: Tensor, image_sizes: Tensor | None, first: Tensor | None = None
) -> Tensor:
    """For each token ``(K, 2)`` (row, column), the number in the batch of the last picture before it in its row; -1 where there is none.
    first ``(K,)``: columns where the tokens' samples begin, 0 by default."""
    placeholders = input_ids == model.config.image_token_id
    before = placeholders.flatten().cumsum(0).view_as(placeholders)  # in the batch, up to and including this token
    lengths = model.model.tokens_of_images(int(before[-1, -1]), image_sizes)
    ends = torch.tensor(lengths, device=input_ids.device).cumsum(0)
    rows, columns = places.unbind(1)
    first = torch.zeros_like(columns) if first is None else first
    found, earlier = before[rows, columns], before[rows, first] - placeholders[rows, first].long()
    return (torch.searchsorted(ends, found, right=True) - 1).masked_fill(found == earlier, -1)
