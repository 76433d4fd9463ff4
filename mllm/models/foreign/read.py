"""What does a checkpoint of another project hold? Its config in our words and its tensors under our names; no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.models.configuration_mllm import MllmConfig
from mllm.models.foreign.settings import read_json


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another project, read but not built.

    Attributes:
        config: Ours.
        tensors: Every weight of the model under our names, but those of ``unread`` encoders.
        dtype: As stored, or as asked for.
        where: The folder, for errors.
        template: Name of the chat template that renders its prompts.
        tokenizer: Folder of the tokenizer; None when there is none.
        unread: Encoders that the checkpoint names by source without holding their weights.
        generation: Its `GenerationConfig`, where it has one.
    """

    config: MllmConfig
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    where: Path
    template: str
    tokenizer: Path | None
    unread: tuple[str, ...] = field(default=())
    generation: Any = None


def recognise(path: Any) -> str | None:
    """``llava`` and ``llava_next`` (transformers' layout), ``llava_original``, ``prismatic``, or None: from the folder's
    config.json alone."""
    file = Path(str(path)) / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if config.get("model_type") in ("llava", "llava_next") and "vision_config" in config:
        return config["model_type"]
    if "mm_vision_tower" in config:
        return "llava_original"
    if isinstance(config.get("model"), dict) and "vision_backbone_id" in config["model"]:
        return "prismatic"
    return None


def read_foreign(
    folder: Path, kind: str, *, dtype: Any = "auto", language_model: str | None = None
) -> ForeignCheckpoint:
    """A recognised checkpoint. Raises `CheckpointError` when a weight is lost or left over, `ConfigError` for a setting that the
    converted model could not honour."""
    from mllm.models.foreign import llava, prismatic  # they take long to import, and most folders are ours

    if kind in ("llava", "llava_next"):
        return llava.read_llava(folder, dtype, tiles=kind == "llava_next")
    if kind == "llava_original":
        return llava.read_llava_original(folder, dtype)
    return prismatic.read_prismatic(folder, dtype, language_model)


def find_tokenizer(folder: Path) -> Path | None:
    """The folder, when it holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return folder if any((folder / name).exists() for name in names) else None
