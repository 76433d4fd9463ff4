"""How does one of our checkpoints become self-contained, adapters merged?"""

from __future__ import annotations

import json
from pathlib import Path

from mllm.errors import ConfigError


def export(checkpoint: str | Path, target: str | Path, *, dtype: str = "auto", shard_size: str = "5GB") -> Path:
    """One self-contained checkpoint: PEFT adapters merged, dtype chosen, sharded safetensors."""
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    checkpoint, target = Path(checkpoint), Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    adapter = checkpoint / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else checkpoint
    model = MllmForConditionalGeneration.from_pretrained(base, dtype=dtype)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()  # type: ignore[assignment]
    model.save_pretrained(target, max_shard_size=shard_size)
    source = (
        checkpoint
        if any((checkpoint / n).exists() for n in ("processor_config.json", "preprocessor_config.json"))
        else base
    )
    AutoProcessor.from_pretrained(source).save_pretrained(target)
    return target
