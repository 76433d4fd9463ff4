"""What does a router read of what is asked?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.types import IMAGE_MARK


def question_text(turn: str, image_token: str) -> str:
    """What a router reads of a user turn: its words with single spaces, without image marks and placeholders."""
    typed = image_token[:1] + " " + image_token[1:]
    for mark, text in ((IMAGE_MARK, " "), (typed, " "), (image_token, " ")):
        turn = turn.replace(mark, text)
    return " ".join(turn.split())


def pad_questions(ids: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of several questions as ``(B, T)`` int64, padded with -1."""
    width = max([1, *(len(row) for row in ids)])
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids], dtype=torch.long).reshape(len(ids), width)
