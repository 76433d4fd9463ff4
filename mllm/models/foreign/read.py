"""What does a checkpoint of another project hold? Its config in our words and its tensors under our names; no model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.models.foreign.checkpoint import ForeignCheckpoint
from mllm.models.foreign.settings import read_json

HUB_LAYOUTS = ("llava", "llava_next", "llava_onevision", "internvl")


def recognise(path: Any) -> str | None:
    """Which format a folder has, from its config.json alone: one of `HUB_LAYOUTS` (transformers' layout), ``llava_original``,
    ``prismatic``, or None."""
    file = Path(str(path)) / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if config.get("model_type") in HUB_LAYOUTS and "vision_config" in config:
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
    from mllm.models.foreign import hub_layout, llava, prismatic  # they take long to import, and most folders are ours

    if kind in HUB_LAYOUTS:
        return hub_layout.read_hub_layout(folder, kind, dtype)
    if kind == "llava_original":
        return llava.read_llava_original(folder, dtype)
    return prismatic.read_prismatic(folder, dtype, language_model)
