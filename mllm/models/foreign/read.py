"""What does a checkpoint of another project hold? Its config in our words and its tensors under our names; no model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.models.foreign.checkpoint import ForeignCheckpoint
from mllm.models.foreign.settings import read_json

HUB_LAYOUTS = ("llava", "llava_next", "llava_onevision", "internvl")
_OF_AUTHORS = {"eve": "eve", "eve-qwen2": "evev2", "internvl_chat": "internvl_chat"}
"""``model_type`` of an authors' own layout → what we call it."""


def recognise(path: Any) -> str | None:
    """Which format a folder has, from its config.json alone: one of `HUB_LAYOUTS` (transformers' layout), of the authors' own layouts
    ``llava_original``, ``internvl_chat``, ``eve``, ``evev2``, ``solo`` or ``prismatic``, or None."""
    file = Path(str(path)) / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if config.get("model_type") in HUB_LAYOUTS and "vision_config" in config:
        return config["model_type"]
    if config.get("model_type") in _OF_AUTHORS:
        return _OF_AUTHORS[config["model_type"]]
    if config.get("architectures") == ["SoloForCausalLM"] or "vision_patch_size" in config:
        return "solo"
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
    # they take long to import, and most folders are ours
    from mllm.models.foreign import encoder_free, hub_layout, internvl, llava, prismatic

    if kind in HUB_LAYOUTS:
        return hub_layout.read_hub_layout(folder, kind, dtype)
    readers = {
        "llava_original": llava.read_llava_original,
        "internvl_chat": internvl.read_internvl_chat,
        "eve": encoder_free.read_eve,
        "evev2": encoder_free.read_evev2,
        "solo": encoder_free.read_solo,
    }
    if kind in readers:
        return readers[kind](folder, dtype)
    return prismatic.read_prismatic(folder, dtype, language_model)
