"""How does one of our checkpoints become self-contained, adapters merged?"""

from __future__ import annotations

from pathlib import Path

from mllm.damage import opening, read_json
from mllm.errors import ConfigError


def export(
    checkpoint: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    shard_size: str = "5GB",
    remote_code: bool = False,
) -> Path:
    """One self-contained checkpoint: PEFT adapters merged, dtype chosen, sharded safetensors. remote_code: it also opens without
    this toolkit (`mllm.models.remote_code`)."""
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    checkpoint, target = Path(checkpoint), Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    adapter = checkpoint / "adapter_config.json"
    base = read_json(adapter)["base_model_name_or_path"] if adapter.is_file() else checkpoint
    with opening(base):
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
    if remote_code:
        from mllm.models.remote_code import write_remote_code

        write_remote_code(target)
    return target
