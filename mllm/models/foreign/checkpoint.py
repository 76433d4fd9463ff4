"""What is a checkpoint of another project once it is read?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.models.configuration_mllm import MllmConfig


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another project, read but not built.

    Attributes:
        config: Ours.
        tensors: Every weight of the model under our names, but those of ``unread`` encoders.
        dtype: As stored, or as asked for.
        where: The folder, for errors.
        template: Name or file of the chat template that renders its prompts; None: the tokenizer's own.
        tokenizer: Folder of the tokenizer; None when there is none.
        unread: Encoders that the checkpoint names by source without holding their weights.
        generation: Its `GenerationConfig`, where it has one.
    """

    config: MllmConfig
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    where: Path
    template: str | None
    tokenizer: Path | None
    unread: tuple[str, ...] = field(default=())
    generation: Any = None


def find_tokenizer(folder: Path) -> Path | None:
    """The folder, when it holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return folder if any((folder / name).exists() for name in names) else None
