"""How is a vision model of transformers built from plain data?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.pix2struct.modeling_pix2struct import Pix2StructVisionModel

from mllm.encoders.library import find_blocks
from mllm.errors import ConfigError, did_you_mean
from mllm.types import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the model normalises, or wants [0, 1]
_PREPROCESSING: dict[str, tuple[Any, str, str]] = {
    "aimv2": (_CLIP, "crop", "bicubic"),
    "beit": (_HALF, "squash", "bicubic"),
    "chinese_clip": (_CLIP, "crop", "bicubic"),
    "clip": (_CLIP, "crop", "bicubic"),
    "convnext": (_IMAGENET, "crop", "bicubic"),
    "deit": (_IMAGENET, "crop", "bicubic"),
    "dinov2": (_IMAGENET, "crop", "bicubic"),
    "dinov3": (_IMAGENET, "squash", "bilinear"),
    "dpt": (_HALF, "squash", "bicubic"),
    "internvl": (_IMAGENET, "squash", "bicubic"),
    "ijepa": (_IMAGENET, "squash", "bicubic"),
    "metaclip_2": (_CLIP, "crop", "bicubic"),
    "mlcd": (_CLIP, "crop", "bicubic"),
    "pix2struct": (_UNIT, "squash", "bilinear"),
    "radio": (_UNIT, "squash", "bicubic"),
    "sam": (_IMAGENET, "letterbox", "bilinear"),
    "siglip": (_HALF, "squash", "bicubic"),
    "siglip2": (_HALF, "squash", "bilinear"),
    "tipsv2": (_UNIT, "squash", "bilinear"),
    "vit": (_HALF, "squash", "bilinear"),
    "vit_mae": (_IMAGENET, "crop", "bicubic"),
    "vit_msn": (_IMAGENET, "crop", "bicubic"),
    "vivit": (_HALF, "crop", "bilinear"),
}
"""Beginning of a model type → (mean, std), resize mode and interpolation of the published preprocessing."""
_NORMS = ("post_layernorm", "layernorm", "post_norm", "ln_post", "rms_norm", "norm", "layer_norm", "neck")
_POOLERS = ("pooler", "head")
NOISE = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label",
    "label2id", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names",
}  # fmt: skip
_INDEX = "generate_relative_position_index"
_PIX2STRUCT_SIDE = 45
"""Patches per side: 45 × 45 = 2025 of the 2048 that Pix2Struct was trained with."""


def vision_config(architecture: dict[str, Any]) -> PreTrainedConfig:
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
        raise ConfigError(
            f"architecture: {model_type} does not accept these values: {' '.join(str(error).split())}"
        ) from error
    inner = getattr(full, "vision_config", None)
    return inner if isinstance(inner, PreTrainedConfig) else full


def published_image(full: PreTrainedConfig, *, normalised: bool) -> ImageSpec:
    """Size and preprocessing that models of this family are published with.

    normalised: the user gives mean and std. Raises `ConfigError` where they are missing and the family is not known.
    """
    height, width = _native_size(full)
    family = _family(full)
    if family is None and not normalised:
        raise ConfigError(
            f"mean: the preprocessing of {full.model_type} is not known; give mean and std, or name weights whose "
            "folder has a preprocessor_config.json"
        )
    (mean, std), resize, interpolation = _PREPROCESSING[family or "vit"]
    return ImageSpec.model_validate(
        {"height": height, "width": width, "mean": mean, "std": std, "resize": resize, "interpolation": interpolation}
    )


def _family(full: PreTrainedConfig) -> str | None:
    names = sorted(_PREPROCESSING, key=len, reverse=True)
    return next((name for name in names if full.model_type.startswith(name)), None)


def model_class(full: PreTrainedConfig) -> Any:
    """The PreTrainedModel class of a vision config. Raises `ConfigError`."""
    if full.model_type == "pix2struct_vision_model":  # not in the Auto classes
        return Pix2StructVisionModel
    if type(full) not in MODEL_MAPPING:
        raise ConfigError(f"architecture.model_type: transformers has no plain model for {full.model_type!r}")
    return MODEL_MAPPING[type(full)]


def new_model(full: PreTrainedConfig, attention: str = "sdpa") -> nn.Module:
    """The model of a vision config, without weights, pooling head and wrapper. Where sdpa is not offered: eager."""
    prepare(full)
    cls = model_class(full)
    try:
        model = cls._from_config(full, attn_implementation=attention)
    except ValueError as error:
        if attention != "sdpa":
            raise ConfigError(f"attention: {full.model_type}: {' '.join(str(error).split())[:300]}") from error
        model = cls._from_config(full, attn_implementation="eager")
    for module in model.modules():
        if hasattr(type(module), _INDEX):
            static = isinstance(inspect.getattr_static(type(module), _INDEX), staticmethod)
            setattr(module, _INDEX, partial(_relative_index, type(module), () if static else (None,)))
    return unwrap(model)


def _relative_index(owner: Any, first: tuple[Any, ...], window_size: tuple[int, int]) -> torch.Tensor:
    """BEiT's table of relative places, on the CPU whatever the default device. transformers keeps the first one that is computed: after a
    pass on the meta device, which measures an encoder, every later model of the process would read numbers that are none."""
    if torch.compiler.is_compiling():  # nothing is remembered then
        return getattr(owner, _INDEX)(*first, window_size)
    return _remembered(owner, first, window_size)


@lru_cache(maxsize=32)
def _remembered(owner: Any, first: tuple[Any, ...], window_size: tuple[int, int]) -> torch.Tensor:
    with torch.device("cpu"):
        return inspect.unwrap(getattr(owner, _INDEX))(*first, window_size)


def prepare(full: PreTrainedConfig) -> None:
    """Tell a config that no pooling head is wanted, and no random positions in training (DINOv3's augmentation for
    learning from scratch, which would make features depend on the mode). In place."""
    if full.model_type.startswith("siglip"):
        full.vision_use_head = False
    if hasattr(full, "use_head"):
        full.use_head = False
    for name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
        if hasattr(full, name):
            setattr(full, name, None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself inside a wrapper (`SamVisionModel.vision_encoder`), without pooling layers."""
    children = list(model.named_children())
    if len(children) == 1 and not list(model.parameters(recurse=False)) and hasattr(children[0][1], "config"):
        model = children[0][1]
    for name in _POOLERS:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, None)
    return model


def keep_own_names(model: nn.Module) -> None:
    """Save and load the model inside ours under its parameters' own names, in every version of transformers.

    transformers 5 renames (and for some families splits) the weights of its own models on saving and loading, even when
    they are parts of another model; other readers of the checkpoint know nothing of that. It leaves foreign code alone.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.is_custom_code = partial(bool, True)  # type: ignore[method-assign, assignment]


def checkpoint_layers(model: PreTrainedModel, enabled: bool) -> None:
    """Whether each block is computed again in the backward pass. Raises `ConfigError` for a model that does not offer it."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ConfigError(f"gradient_checkpointing: {model.config.model_type} does not offer it")
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        layer.gradient_checkpointing = enabled


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


def _native_size(full: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(full, "image_size", None)
    if size is None:
        side = int(full.num_patches**0.5) if hasattr(full, "num_patches") else _PIX2STRUCT_SIDE
        size = side * patch_size(full) if full.model_type.startswith(("siglip2", "pix2struct")) else 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def set_image_size(full: PreTrainedConfig, image: ImageSpec) -> None:
    """Position tables are built for square images of the run's size; other shapes interpolate the published table on
    use."""
    if isinstance(getattr(full, "image_size", None), int) and image.height == image.width:
        full.image_size = image.height


def patch_size(full: PreTrainedConfig) -> int:
    """Pixels per side of a patch; 1 for models of another kind, which give maps instead of sequences."""
    size = getattr(full, "patch_size", None)
    if size is None and hasattr(full, "patch_embed_hidden_size"):  # Pix2Struct says how many numbers a patch has
        return math.isqrt(full.patch_embed_hidden_size // 3)
    if size is None:
        return 1
    return size if isinstance(size, int) else int(size[0])
