"""What does a Prismatic run hold?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm.damage import read_safetensors
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, encoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.settings import Settings, read_json
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import chosen_dtype, read_pickle

_PRISMATIC_ENCODERS: dict[str, dict[str, str]] = {
    "dinosiglip-vit-so-384px": {
        "dino_featurizer": "vit_large_patch14_reg4_dinov2",
        "siglip_featurizer": "vit_so400m_patch14_siglip_384",
    },
    "dinosiglip-vit-so-224px": {
        "dino_featurizer": "vit_large_patch14_reg4_dinov2",
        "siglip_featurizer": "vit_so400m_patch14_siglip_224",
    },
    "siglip-vit-so400m-384px": {"featurizer": "vit_so400m_patch14_siglip_384"},
    "siglip-vit-so400m": {"featurizer": "vit_so400m_patch14_siglip_224"},
    "clip-vit-l-336px": {"featurizer": "vit_large_patch14_clip_336"},
    "clip-vit-l": {"featurizer": "vit_large_patch14_clip_224"},
    "dinov2-vit-l": {"featurizer": "vit_large_patch14_reg4_dinov2"},
}
_PRISMATIC_RESIZE = {"resize-naive": "squash", "resize-crop": "crop", "letterbox": "letterbox"}


_PROJECTORS = {"linear": 1, "gelu-mlp": 2, "fused-gelu-mlp": 3}
"""Part of ``arch_specifier`` → linear layers."""


def read_prismatic(folder: Path, dtype: Any, language_model: str | None) -> ForeignCheckpoint:
    """A Prismatic run: ``config.json`` and ``checkpoints/latest-checkpoint.pt`` (or ``.safetensors``) with ``projector``,
    ``llm_backbone`` and, when it was trained, ``vision_backbone``."""
    settings = Settings(read_json(folder / "config.json")["model"], folder / "config.json")
    featurizers, encoders = _encoders(settings, folder)
    architecture = settings.take("arch_specifier") or ""
    settings.harmless(
        "type", "model_id", "llm_backbone_id", "llm_max_length", "(align|finetune)_.*", "reduce_in_full_precision"
    )
    settings.harmless("enable_.*", "pretrained_checkpoint", "seed", "hf_token", "wandb_.*", "trackers", "stage")
    settings.finish()
    parts = _read_checkpoint(folder / "checkpoints")
    unknown = sorted(set(parts) - {"projector", "llm_backbone", "vision_backbone"})
    if unknown or not {"projector", "llm_backbone"} <= set(parts):
        raise CheckpointError(
            f"{folder}: the checkpoint holds {sorted(parts)}, expected projector, llm_backbone and perhaps vision_backbone"
        )
    llm = Tensors(parts["llm_backbone"], folder)
    decoder = llm.take("llm.model.")
    if "embed_tokens.weight" not in decoder:
        raise CheckpointError(
            f"{folder}: llm.model.embed_tokens.weight is missing; the checkpoint is cut, copy it again"
        )
    text = _prismatic_text_config(decoder, language_model)
    head = output_head(
        decoder["embed_tokens.weight"], llm.take("llm.lm_head."), tied=bool(text.tie_word_embeddings), where=folder
    )
    llm.finish()
    chosen = chosen_dtype(dtype, decoder)
    projector = dict(parts["projector"])
    ours = model_config(
        encoders,
        _connector(projector, architecture, len(encoders), folder),
        text=text,
        image_token_id=decoder["embed_tokens.weight"].shape[0],
        head_bias="bias" in head,
        dtype=chosen,
    )
    tensors = {**decoder_tensors(decoder), **head_tensors(head), **projector_tensors(projector)}
    vision = Tensors(parts.get("vision_backbone", {}), folder)
    towers = {name: vision.take(f"{key}.") for name, key in zip(encoders, featurizers)}
    vision.finish()
    for name, tower in towers.items():
        if tower:
            tensors |= encoder_tensors(ours, name, tower, folder)
    unread = tuple(name for name, tower in towers.items() if not tower)
    if unread and len(unread) < len(towers):
        raise CheckpointError(
            f"{folder}: vision_backbone holds weights of some encoders and none of {', '.join(unread)}"
        )
    source = Path(language_model) if language_model else folder
    return ForeignCheckpoint(ours, tensors, chosen, folder, "prismatic", find_tokenizer(source), unread)


def _encoders(settings: Settings, folder: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Prismatic's names of the encoders, and theirs and settings in our words."""
    backbone = settings.take("vision_backbone_id")
    featurizers = settings.take("timm_models") or _PRISMATIC_ENCODERS.get(backbone)
    if featurizers is None:
        raise ConfigError(
            f"{folder}: vision_backbone_id {backbone!r} is not known; known: {', '.join(_PRISMATIC_ENCODERS)}"
        )
    strategy = settings.take("image_resize_strategy", "letterbox")
    if strategy not in _PRISMATIC_RESIZE:
        raise ConfigError(f"{folder}: image_resize_strategy {strategy!r} is not supported")
    pixels = re.search(r"(\d+)px", backbone)
    size = settings.take("image_size", int(pixels.group(1)) if pixels else 224)
    options = settings.take("timm_options", {})
    names = ["spatial", "semantic"] if len(featurizers) == 2 else ["vision"]
    encoders = {
        name: {
            "type": "timm",
            "architecture": model,
            "options": options,
            "image_size": size,
            "layers": [-2],
            "final_norm": False,
            "resize": _PRISMATIC_RESIZE[strategy],
            "weights": {"source": "timm", "licence": "Apache-2.0"},
        }
        for name, model in zip(names, featurizers.values())
    }
    return list(featurizers), encoders


def _connector(projector: Mapping[str, Tensor], architecture: str, num_encoders: int, folder: Path) -> dict[str, Any]:
    linear = sorted({int(k.split(".")[1]) for k in projector if k.endswith("weight")})
    named = architecture.removeprefix("no-align+").removeprefix("full-align+") or None
    expected = _PROJECTORS.get(named) if named is not None else len(linear)
    if expected is None:
        raise ConfigError(f"{folder}: arch_specifier {architecture!r} is not known; known: {', '.join(_PROJECTORS)}")
    if expected != len(linear):
        raise CheckpointError(
            f"{folder}: {architecture} should have {expected} linear layers, the checkpoint has {len(linear)}"
        )
    hidden = [projector[f"projector.{i}.weight"].shape[0] for i in linear[:-1]]
    shape = {"depth": len(linear), **({"hidden": hidden} if hidden else {})}
    return {"type": "channel_concat", "projector": shape} if num_encoders > 1 else {"type": "mlp", **shape}


def _prismatic_text_config(decoder: Mapping[str, Tensor], language_model: str | None) -> Any:
    """Prismatic stores no LLM config: read it from ``language_model``, else from the weights' shapes (Llama, heads of 128)."""
    if language_model is not None:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(language_model).get_text_config()
        except OSError as error:
            raise UnavailableError(f"--language-model {language_model}: its config cannot be read") from error
    from transformers import LlamaConfig

    vocabulary, hidden = decoder["embed_tokens.weight"].shape
    head = 128
    if hidden % head:
        raise ConfigError(
            "the LLM's heads cannot be told from its weights; give --language-model with its config and tokenizer"
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=decoder["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=1 + max(int(k.split(".")[1]) for k in decoder if k.startswith("layers.")),
        num_attention_heads=hidden // head,
        num_key_value_heads=decoder["layers.0.self_attn.k_proj.weight"].shape[0] // head,
        rms_norm_eps=1e-5,
    )


def _read_checkpoint(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A Prismatic checkpoint as part → tensors."""
    file = next(
        (folder / n for n in ("latest-checkpoint.safetensors", "latest-checkpoint.pt") if (folder / n).is_file()), None
    )
    if file is None:
        raise CheckpointError(f"{folder}: no latest-checkpoint.pt or .safetensors")
    if file.suffix == ".safetensors":
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_safetensors(file).items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        return parts
    data = read_pickle(file)
    return data.get("model", data)
