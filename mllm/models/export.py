"""How does one of our checkpoints become self-contained, adapters merged?"""

from __future__ import annotations

from pathlib import Path

from mllm.damage import opening, read_json
from mllm.errors import ConfigError
from mllm.models.card import model_card
from mllm.models.trained_parts import join, parts_folder, split
from mllm.models.whole_folder import whole_folder


def export(
    checkpoint: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    shard_size: str = "5GB",
    remote_code: bool = False,
    without_language_model: bool = False,
) -> Path:
    """One self-contained checkpoint: PEFT adapters merged, dtype chosen, sharded safetensors. remote_code: it also opens without
    this toolkit (`mllm.models.remote_code`). without_language_model: all but published weights, which are named with their hashes
    (`mllm.models.trained_parts`); of such a folder as ``checkpoint`` the whole one is made again."""
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    checkpoint, target = Path(checkpoint), Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    parts = parts_folder(checkpoint)
    if without_language_model:
        if parts is not None or dtype != "auto" or remote_code or not checkpoint.is_dir():
            raise ConfigError(
                "--without-language-model takes a whole checkpoint's folder, as it is stored: leave --dtype and --remote-code out"
            )
        with whole_folder(target) as writing:
            split(checkpoint, writing)
            (writing / "README.md").write_text(
                model_card(writing, f"owner/{target.name}", scores=evaluation_beside(checkpoint)), encoding="utf-8"
            )
        return target
    if parts is not None:
        with whole_folder(target) as writing:
            join(parts, writing, dtype=dtype, shard_size=shard_size)
            if remote_code:
                _add_remote_code(writing)
        return target
    adapter = checkpoint / "adapter_config.json"
    base = read_json(adapter)["base_model_name_or_path"] if adapter.is_file() else checkpoint
    with opening(base):
        model = MllmForConditionalGeneration.from_pretrained(base, dtype=dtype)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()  # type: ignore[assignment]
    source = (
        checkpoint
        if any((checkpoint / n).exists() for n in ("processor_config.json", "preprocessor_config.json"))
        else base
    )
    processor = AutoProcessor.from_pretrained(source)
    with whole_folder(target) as writing:
        model.save_pretrained(writing, max_shard_size=shard_size)
        processor.save_pretrained(writing)
        if remote_code:
            _add_remote_code(writing)
    return target


def evaluation_beside(checkpoint: Path) -> Path | None:
    """The folder of the evaluation beside a checkpoint; None: there is none."""
    beside = checkpoint.parent / "eval"
    return beside if (beside / "results.json").is_file() else None


def _add_remote_code(target: Path) -> None:
    from mllm.models.remote_code import write_remote_code

    write_remote_code(target)
