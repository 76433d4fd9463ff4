"""How does a checkpoint of another project become a folder of ours?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.hub import hub_reason
from mllm.models.foreign.checkpoint import ForeignCheckpoint
from mllm.models.foreign.read import read_foreign, recognise

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


def convert(source: str, target: str | Path, *, dtype: str = "auto", language_model: str | None = None) -> Path:
    """Write a foreign checkpoint as ours. Raises `CheckpointError` for a format that is not recognised."""
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    target = Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source))
        except Exception as error:
            raise UnavailableError(f"no folder {source} here; as a hub id: {hub_reason(error, source)}") from error
    kind = recognise(folder)
    if kind is None:
        raise CheckpointError(
            f"{source}: not a LLaVA-1.5 checkpoint (config.json with vision_config or mm_vision_tower) nor a Prismatic run "
            "(config.json with model.vision_backbone_id)"
        )
    found = read_foreign(folder, kind, dtype=dtype, language_model=language_model)
    model = MllmForConditionalGeneration.from_foreign(found)
    processor = converted_processor(found, model)
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)
    return target


def converted_processor(found: ForeignCheckpoint, model: MllmForConditionalGeneration) -> Any:
    """The processor of a converted model, when there is a tokenizer; the model's embedding grows where it is too small."""
    from transformers import AutoTokenizer

    from mllm.models.build import build_processor
    from mllm.models.stops import set_stops
    from mllm.models.vocabulary import added_ids, grow_vocabulary, num_token_ids
    from mllm.recipe import ModelSpec

    if found.tokenizer is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer)
    placeholder = (
        tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        if model.config.image_token_id < len(tokenizer)
        else None
    )
    spec = ModelSpec.model_validate(
        {
            "language_model": {"source": str(found.tokenizer)},
            "chat_template": found.template,
            "image_token": placeholder or "<image>",
        }
    )
    before = len(tokenizer)
    processor = build_processor(spec, model.config, tokenizer)
    model.config.image_token_id = processor.image_token_id
    model.config.added_token_ids = added_ids(before, tokenizer, model.config.text_config.vocab_size)
    model.config.num_token_ids = num_token_ids(tokenizer)
    grow_vocabulary(model, num_token_ids(tokenizer))
    set_stops(model, processor, source=str(found.tokenizer))
    return processor
