"""How is a vision model of transformers built from plain data?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.pix2struct.modeling_pix2struct import Pix2StructVisionModel

from mllm.encoders.library import find_blocks
from mllm.errors import ConfigError, did_you_mean
from mllm.types import ImageSpec

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the model normalises, or wants [0, 1]
_PREPROCESSING: dict[str, tuple[Any, str]] = {
    "clip": (_CLIP, "crop"),
    "chinese_clip": (_CLIP, "crop"),
    "metaclip": (_CLIP, "crop"),
    "mlcd": (_CLIP, "crop"),
    "aimv2": (_CLIP, "crop"),
    "siglip": (_HALF, "squash"),
    "vit": (_HALF, "squash"),
    "dinov2": (_IMAGENET, "crop"),
    "dinov3": (_IMAGENET, "squash"),
    "convnext": (_IMAGENET, "crop"),
    "sam": (_IMAGENET, "letterbox"),
    "radio": (_UNIT, "squash"),
    "tipsv2": (_UNIT, "squash"),
    "pix2struct": (_UNIT, "squash"),
}
"""First part of a model type → (mean, std) and resize mode of the published preprocessing."""
_NORMS = ("post_layernorm", "layernorm", "post_norm", "ln_post", "rms_norm", "norm", "layer_norm", "neck")
_POOLERS = ("pooler", "head")
NOISE = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id", "auto_map",
    "out_features", "out_indices", "_out_features", "_out_indices", "stage_names",
}  # fmt: skip
_PIX2STRUCT_SIDE = 45
"""Patches per side: 45 × 45 = 2025 of the 2048 that Pix2Struct was trained with."""


def vision_config(architecture: dict[str, Any]) -> Any:
    """The vision part of an HF config given as plain data. Raises `ConfigError`."""
    settings = dict(architecture)
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING_NAMES:
        close = did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)
        raise ConfigError(f"architecture.model_type: transformers has no {model_type!r}{close}")
    known = set(AutoConfig.for_model(model_type).to_dict())
    for key in settings:
        if key not in known and not key.startswith("_") and (close := did_you_mean(key, known)):
            if key in NOISE:
                continue
            raise ConfigError(f"architecture.{key}: {model_type} has no such key{close}")
    try:
        full = AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        raise ConfigError(f"architecture: {model_type} does not accept these values: {' '.join(str(error).split())}") from error
    inner = getattr(full, "vision_config", None)
    return inner if isinstance(inner, PreTrainedConfig) else full


def published_image(full: Any) -> ImageSpec:
    """Size and preprocessing that models of this family are published with."""
    family = full.model_type.split("_")[0].split("-")[0]
    family = next((name for name in sorted(_PREPROCESSING, key=len, reverse=True) if family.startswith(name)), "dinov2")
    (mean, std), resize = _PREPROCESSING[family]
    height, width = _native_size(full)
    return ImageSpec(height=height, width=width, mean=mean, std=std, resize=resize)  # type: ignore[arg-type]


def model_class(full: Any) -> Any:
    """The PreTrainedModel class of a vision config. Raises `ConfigError`."""
    if full.model_type == "pix2struct_vision_model":  # not in the Auto classes
        return Pix2StructVisionModel
    if type(full) not in MODEL_MAPPING:
        raise ConfigError(f"architecture.model_type: transformers has no plain model for {full.model_type!r}")
    return MODEL_MAPPING[type(full)]


def new_model(full: Any, attention: str = "sdpa") -> nn.Module:
    """The model of a vision config, without weights, pooling head and wrapper. Where sdpa is not offered: eager."""
    drop_heads(full)
    cls = model_class(full)
    try:
        model = cls._from_config(full, attn_implementation=attention)
    except ValueError as error:
        if attention != "sdpa":
            raise ConfigError(f"attention: {full.model_type}: {' '.join(str(error).split())[:300]}") from error
        model = cls._from_config(full, attn_implementation="eager")
    return unwrap(model)


def drop_heads(full: Any) -> None:
    """Tell a config that no pooling head is wanted. In place."""
    if full.model_type.startswith("siglip"):
        full.vision_use_head = False
    if hasattr(full, "use_head"):
        full.use_head = False


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself inside a wrapper (`SamVisionModel.vision_encoder`), without pooling layers."""
    children = list(model.named_children())
    if len(children) == 1 and not list(model.parameters(recurse=False)) and hasattr(children[0][1], "config"):
        model = children[0][1]
    for name in _POOLERS:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, None)
    return model


def cut_blocks(model: nn.Module, count: int) -> None:
    """Keep the first ``count`` blocks."""
    path, blocks = find_blocks(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(list(blocks.children())[:count]))  # type: ignore[union-attr]


def final_norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path of the owner, attribute) of the last norm: beside the block list or above it."""
    path, _ = find_blocks(model)
    parts = path.split(".")[:-1]
    for depth in range(len(parts) + 1):
        owner = ".".join(parts[:depth])
        for name in _NORMS:
            if isinstance(getattr(model.get_submodule(owner), name, None), nn.Module):
                yield owner, name


def num_blocks(architecture: dict[str, Any]) -> int:
    """Number of blocks (or stages) of the whole model."""
    full = vision_config(architecture)
    for name in ("num_hidden_layers", "num_stages", "depth"):
        if isinstance(getattr(full, name, None), int):
            return getattr(full, name)
    raise ConfigError(f"architecture: the config of {full.model_type} does not say how many blocks it has")


def _native_size(full: Any) -> tuple[int, int]:
    size = getattr(full, "image_size", None)
    if size is None:
        side = int(full.num_patches**0.5) if hasattr(full, "num_patches") else _PIX2STRUCT_SIDE
        size = side * patch_size(full) if full.model_type.startswith(("siglip2", "pix2struct")) else 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def set_image_size(full: Any, image: ImageSpec) -> None:
    """Position tables are built for square images of the run's size; other shapes interpolate the published table on use."""
    if isinstance(getattr(full, "image_size", None), int) and image.height == image.width:
        full.image_size = image.height


def patch_size(full: Any) -> int:
    """Pixels per side of a patch; 1 for models of another kind, which give maps instead of sequences."""
    size = getattr(full, "patch_size", None)
    if size is None and hasattr(full, "patch_embed_hidden_size"):  # Pix2Struct says how many numbers a patch has
        return math.isqrt(full.patch_embed_hidden_size // 3)
    if size is None:
        return 1
    return size if isinstance(size, int) else int(size[0])
