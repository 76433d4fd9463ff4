"""What does a Prismatic run hold?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.conversion import assemble, converted_processor
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


def read_prismatic(folder: Path, dtype: Any, language_model: str | None) -> tuple[Any, Any]:
    """A Prismatic run: ``config.json`` and ``checkpoints/latest-checkpoint.pt`` (or ``.safetensors``) with ``projector``,
    ``llm_backbone`` and, when it was trained, ``vision_backbone``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    backbone, architecture = config["vision_backbone_id"], config.get("arch_specifier", "")
    featurizers = config.get("timm_models") or _PRISMATIC_ENCODERS.get(backbone)
    if featurizers is None:
        raise ConfigError(
            f"{folder}: vision_backbone_id {backbone!r} is not known; known: {', '.join(_PRISMATIC_ENCODERS)}"
        )
    weights = _read_checkpoint(folder / "checkpoints")
    parts = {name: weights[name] for name in ("projector", "llm_backbone") if name in weights}
    if len(parts) < 2:
        raise CheckpointError(f"{folder}: the checkpoint holds {sorted(weights)}, expected projector and llm_backbone")
    size = int(re.search(r"(\d+)px", backbone).group(1)) if re.search(r"\d+px", backbone) else 224  # type: ignore[union-attr]
    names = ["spatial", "semantic"] if len(featurizers) == 2 else ["vision"]
    resize = _PRISMATIC_RESIZE.get(config.get("image_resize_strategy", "letterbox"))
    if resize is None:
        raise ConfigError(f"{folder}: image_resize_strategy {config['image_resize_strategy']!r} is not supported")
    encoders = {
        name: {
            "type": "timm",
            "architecture": model,
            "options": config.get("timm_options", {}),
            "image_size": config.get("image_size", size),
            "layers": [-2],
            "final_norm": False,
            "resize": resize,
            "weights": {"source": "timm", "licence": "Apache-2.0"},
        }
        for name, model in zip(names, featurizers.values())
    }
    projector = dict(parts["projector"])
    linear = sorted({int(k.split(".")[1]) for k in projector if k.endswith("weight")})
    if "fused" in architecture and len(linear) != 3:
        raise CheckpointError(f"{folder}: {architecture} should have 3 linear layers, the checkpoint has {len(linear)}")
    hidden = [projector[f"projector.{i}.weight"].shape[0] for i in linear[:-1]]
    shape = {"depth": len(linear), **({"hidden": hidden} if hidden else {})}
    connector = {"type": "channel_concat", "projector": shape} if len(encoders) > 1 else {"type": "mlp", **shape}
    decoder = {k.removeprefix("llm."): v for k, v in parts["llm_backbone"].items()}
    text = _prismatic_text_config(decoder, language_model)
    vision = weights.get("vision_backbone", {})
    model = assemble(
        {"encoders": encoders, "connector": connector},
        text=text,
        image_token_id=decoder["model.embed_tokens.weight"].shape[0],
        dtype=chosen_dtype(dtype, decoder),
        decoder={k.removeprefix("model."): v for k, v in decoder.items() if k.startswith("model.")},
        head={"weight": decoder.get("lm_head.weight", decoder["model.embed_tokens.weight"])},
        encoders={
            name: {k.removeprefix(f"{key}."): v for k, v in vision.items() if k.startswith(f"{key}.")}
            for name, key in zip(names, featurizers)
            if any(k.startswith(f"{key}.") for k in vision)
        },
        projector=projector,
        where=folder,
    )
    for name, encoder in model.model.vision_tower.encoders.items():
        if not any(k.startswith(f"{list(featurizers)[names.index(name)]}.") for k in vision):
            encoder.load_pretrained()
    tokenizer = Path(language_model) if language_model else folder
    return model, converted_processor(tokenizer, model, "prismatic")


def _prismatic_text_config(decoder: Mapping[str, Tensor], language_model: str | None) -> Any:
    """Prismatic stores no LLM config: read it from ``language_model``, else from the weights' shapes (Llama, heads of 128)."""
    if language_model is not None:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(language_model).get_text_config()
        except OSError as error:
            raise UnavailableError(f"--language-model {language_model}: its config cannot be read") from error
    from transformers import LlamaConfig

    vocabulary, hidden = decoder["model.embed_tokens.weight"].shape
    head = 128
    if hidden % head:
        raise ConfigError(
            "the LLM's heads cannot be told from its weights; give --language-model with its config and tokenizer"
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=decoder["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in decoder if k.startswith("model.layers.")),
        num_attention_heads=hidden // head,
        num_key_value_heads=decoder["model.layers.0.self_attn.k_proj.weight"].shape[0] // head,
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
        from safetensors.torch import load_file

        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(file).items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        return parts
    data = read_pickle(file)
    return data.get("model", data)
