"""How does a checkpoint of another project become a folder of ours?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.hub import hub_reason
from mllm.models.foreign.checkpoint import ForeignCheckpoint
from mllm.models.foreign.read import read_foreign, recognise
from mllm.models.whole_folder import whole_folder
from mllm.processing.template import check_template, shipped_templates

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


def convert(
    source: str,
    target: str | Path,
    *,
    dtype: str = "auto",
    language_model: str | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write a foreign checkpoint as ours.

    Args:
        source: Folder or hub id.
        target: Folder to write.
        dtype: Of the weights; ``auto``: as stored.
        language_model: Prismatic: where the language model's config and tokenizer are.
        chat_template: Shipped name or Jinja file, in place of what the checkpoint's prompts are known to look like.

    Raises:
        CheckpointError: The format is not recognised, or a weight is lost or left over.
        ConfigError: A setting that the converted model could not honour.
    """
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
            f"{source}: neither a LLaVA, LLaVA-NeXT, LLaVA-OneVision or InternVL checkpoint in transformers' layout (config.json with "
            "that model_type and a vision_config), nor LLaVA-1.5 (mm_vision_tower), InternVL (internvl_chat), EVE (eve, eve-qwen2) or SOLO "
            "(SoloForCausalLM) in its authors', nor a Prismatic run (model.vision_backbone_id)"
        )
    found = read_foreign(folder, kind, dtype=dtype, language_model=language_model)
    model = MllmForConditionalGeneration.from_foreign(found)
    processor = converted_processor(found, model, chat_template)
    with whole_folder(target) as writing:
        model.save_pretrained(writing)
        if processor is not None:
            processor.save_pretrained(writing)
    return target


def converted_processor(
    found: ForeignCheckpoint, model: MllmForConditionalGeneration, chat_template: str | None = None
) -> Any:
    """The processor of a converted model, when there is a tokenizer; the model's embedding grows where it is too small. Raises
    `ConfigError` where nothing says how its prompts are written."""
    from transformers import AutoTokenizer

    from mllm.models.build import build_processor
    from mllm.models.stops import set_stops
    from mllm.models.vocabulary import added_ids, grow_vocabulary, num_token_ids
    from mllm.recipe import ModelSpec

    if found.tokenizer is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.tokenizer)
    except Exception as error:
        raise UnavailableError(
            f"{found.tokenizer}: its tokenizer cannot be read ({error}); where it is code of the authors' own, put tokenizer.json and "
            "tokenizer_config.json of the same checkpoint in transformers' layout into the folder"
        ) from error
    image_id = model.config.image_token_id
    assert image_id is not None, "a reader of foreign checkpoints gives it"
    placeholder = tokenizer.convert_ids_to_tokens(image_id) if image_id < num_token_ids(tokenizer) else None
    template = chat_template or _template(found, tokenizer)
    spec = ModelSpec.model_validate(
        {
            "language_model": {"source": str(found.tokenizer)},
            "chat_template": template,
            "image_token": placeholder or "<image>",
        }
    )
    before = set(tokenizer.get_vocab().values())
    processor = build_processor(spec, model.config, tokenizer)
    model.config.image_token_id = processor.image_token_id
    model.config.added_token_ids = added_ids(before, tokenizer, model.config.text_config.vocab_size)
    model.config.num_token_ids = num_token_ids(tokenizer)
    grow_vocabulary(model, num_token_ids(tokenizer))
    set_stops(model, processor, source=str(found.tokenizer))
    return processor


def _template(found: ForeignCheckpoint, tokenizer: Any) -> str | None:
    """Name of the chat template; None: the tokenizer's own. Raises `ConfigError` where there is neither."""
    if found.template is not None:
        return found.template
    try:
        if tokenizer.chat_template is None:
            raise ConfigError("chat_template: the tokenizer has none")
        check_template(tokenizer, tokenizer.chat_template)
    except ConfigError as error:
        raise ConfigError(
            f"{found.where}: how the prompts of its language model ({found.config.text_config.model_type}) are written is not known, and "
            f"its own template takes messages in parts ({error}); name one: --chat-template FILE.jinja, or one of "
            f"{', '.join(shipped_templates())}"
        ) from error
    return None
