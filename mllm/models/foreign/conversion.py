"""How does a checkpoint of another format become ours?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.connectors.build import connector_config
from mllm.encoders.catalogue import encoder_config
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.weight_files import some_names


def recognise(path: Any) -> str | None:
    """``llava`` (transformers' layout), ``llava_original``, ``prismatic``, or None: from the folder's config.json alone."""
    folder = Path(str(path))
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); the checkpoint is damaged, copy it again") from error
    if config.get("model_type") == "llava" and "vision_config" in config:
        return "llava"
    if "mm_vision_tower" in config:
        return "llava_original"
    if isinstance(config.get("model"), dict) and "vision_backbone_id" in config["model"]:
        return "prismatic"
    return None


def open_foreign(path: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Our model made from a recognised foreign checkpoint folder; None for everything else."""
    kind = recognise(path) if isinstance(path, (str, Path)) else None
    if kind is None:
        return None
    model, _ = read_foreign(Path(path), kind, dtype=dtype or "auto")
    device_map = kwargs.get("device_map")
    return model.eval() if device_map is None else model.eval().to(device_map)


def convert(source: str, target: str | Path, *, dtype: str = "auto", language_model: str | None = None) -> Path:
    """Write a foreign checkpoint as ours. Raises `CheckpointError` for a format that is not recognised."""
    target = Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source))
        except Exception as error:
            raise UnavailableError(
                f"{source}: no such folder, and the hub does not give it ({type(error).__name__})"
            ) from error
    kind = recognise(folder)
    if kind is None:
        raise CheckpointError(
            f"{source}: not a LLaVA-1.5 checkpoint (config.json with vision_config or mm_vision_tower) nor a Prismatic run "
            "(config.json with model.vision_backbone_id)"
        )
    model, processor = read_foreign(folder, kind, dtype=dtype, language_model=language_model)
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)
    return target


def read_foreign(folder: Path, kind: str, *, dtype: Any = "auto", language_model: str | None = None) -> tuple[Any, Any]:
    """Model and processor (None where the folder has no tokenizer) of a foreign checkpoint."""
    from mllm.models.foreign import llava, prismatic  # they use this module

    if kind == "llava":
        return llava.read_llava(folder, dtype)
    if kind == "llava_original":
        return llava.read_llava_original(folder, dtype)
    return prismatic.read_prismatic(folder, dtype, language_model)


def assemble(
    spec: Mapping[str, Any],
    *,
    text: Any,
    image_token_id: int,
    dtype: torch.dtype,
    decoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    encoders: Mapping[str, Mapping[str, Tensor]],
    projector: Mapping[str, Tensor],
    where: Path,
) -> Any:
    """Our model with every weight of a foreign one put in place; a weight that is left over or missing is an error."""
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    config = MllmConfig(
        text_config=text,
        encoders={name: encoder_config(value, where=f"encoders.{name}") for name, value in spec["encoders"].items()},
        connector=connector_config(dict(spec["connector"])),
        image_token_id=image_token_id,
        lm_head_bias="bias" in head,
        dtype=dtype,
    )
    model = MllmForConditionalGeneration(config).to(dtype)
    _fill(model.model.language_model, decoder, f"{where}: language model")
    _fill(model.lm_head, head, f"{where}: head")
    for name, state in encoders.items():
        # The encoder is cut after the layer it hands out, so a whole encoder has weights to spare.
        _fill(model.model.vision_tower.encoders[name].model, state, f"{where}: encoder {name}", spare=True)
    _fill(model.model.multi_modal_projector, projector, f"{where}: projector")
    model.tie_weights()
    return model.eval()


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str, *, spare: bool = False) -> None:
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(state))
    foreign = [] if spare else sorted(set(state) - set(wanted))
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or foreign or shapes:
        raise CheckpointError(
            f"{where}: missing [{some_names(missing)}], left over [{some_names(foreign)}], other shape [{some_names(shapes)}]"
        )
    module.load_state_dict({k: state[k] for k in wanted})


def converted_processor(folder: Path, model: Any, template: str) -> Any:
    """The processor of a converted model, when its folder holds a tokenizer."""
    from transformers import AutoTokenizer

    from mllm.models.build import build_processor
    from mllm.recipe import ModelSpec

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    placeholder = (
        tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        if model.config.image_token_id < len(tokenizer)
        else None
    )
    spec = ModelSpec.model_validate(
        {
            "language_model": {"source": str(folder)},
            "chat_template": template,
            "image_token": placeholder or "<image>",
        }
    )
    processor = build_processor(spec, model.config, tokenizer)
    model.config.image_token_id = processor.image_token_id
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    return processor
