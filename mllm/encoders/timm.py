"""Which features does a timm model give?"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import (
    ImageEncoderConfig,
    LayerOutput,
    LibraryEncoder,
    convolution_layout,
    map_to_tokens,
    take_layers,
)
from mllm.encoders.weights import load_exactly, local_path, read_weights, strip_prefix, unavailable
from mllm.errors import CheckpointError, ConfigError, did_you_mean
from mllm.types import Grid, ImageSpec

_RESIZE = {"center": "crop", "squash": "squash", "border": "letterbox"}
_INTERPOLATION = {"bicubic", "bilinear", "nearest", "lanczos"}


class TimmConfig(ImageEncoderConfig):
    """A timm model by name."""

    architecture: str
    """timm's model name, with its tag where one is meant: ``vit_large_patch14_reg4_dinov2.lvd142m``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """timm's own model arguments, e.g. ``{embed_dim: 64, depth: 4, num_heads: 4}`` for a model from scratch."""
    train_batch_norm: bool = True
    """Update batch norms' running statistics while the encoder learns. False keeps the published ones, whose rounding in bf16 and
    small batches would drift."""


class TimmEncoder(LibraryEncoder):
    """DINOv2, DINOv3, SigLIP, SigLIP2, ConvNeXt, EVA-02, SAM, ViTamin, DaViT … by name.

    Layers are blocks, or stages of hierarchical models. ``final_norm`` means timm's `forward_features`: the last
    norm, or the neck of SAM (which changes the width to 256).
    """

    Config: ClassVar[type[EncoderConfig]] = TimmConfig
    config: TimmConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "timm",
            "architecture": "vit_small_patch14_reg4_dinov2",
            "options": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4},
            "image_size": 16,
            "layers": [-2, -1],
            "keep_prefix": True,
        }

    @classmethod
    def default_image(cls, config: TimmConfig) -> ImageSpec:
        return timm_image(config.architecture)

    @classmethod
    def build(cls, config: TimmConfig) -> nn.Module:
        model = create(config.architecture, config.resolved_info.image, config.options)
        cut(model, config)
        return model

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        if not isinstance(self.model, VisionTransformer | Eva):
            pixels = convolution_layout(pixels)
        return timm_layers(self.model, pixels, self.config)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        set_checkpointing(self.model, enabled)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and not self.config.train_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def load_pretrained(self) -> None:
        weights, config = self.required_weights(), self.config
        path = local_path(weights.source) if weights.source != "timm" else None
        if path is not None:
            load_timm(
                self.model,
                read_weights(path),
                config.architecture,
                config.resolved_info.image,
                config.options,
                str(path),
            )
            return
        overlay = None
        if weights.source != "timm":
            hub_id = weights.source.removeprefix("hf-hub:")
            overlay = {"hf_hub_id": f"{hub_id}@{weights.revision}" if weights.revision else hub_id, "url": ""}
        elif weights.revision:
            hub_id = getattr(timm.models.get_pretrained_cfg(config.architecture), "hf_hub_id", None)
            overlay = {"hf_hub_id": f"{hub_id}@{weights.revision}", "url": ""} if hub_id else None
        named = f"timm's {config.architecture}" if weights.source == "timm" else weights.source
        try:
            donor = create(
                config.architecture,
                config.resolved_info.image,
                config.options,
                pretrained=True,
                pretrained_cfg_overlay=overlay,
            )
        except RuntimeError as error:
            if "state_dict" in str(error) or "No pretrained weights" in str(error):
                raise CheckpointError(f"weights: {weights.source}: {error}") from error
            raise unavailable(named, error) from error
        except Exception as error:
            raise unavailable(named, error) from error
        load_exactly(self.model, donor.state_dict(), source=weights.source, known=donor.state_dict())


def timm_image(architecture: str) -> ImageSpec:
    """The pretrained preprocessing of a timm model. Raises `ConfigError` for an unknown name."""
    name, _, tag = architecture.partition(".")
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models())
        raise ConfigError(
            f"architecture: timm has no model {name!r}{close} (python -c 'import timm; timm.list_models()')"
        )
    try:
        published = timm.models.get_pretrained_cfg(architecture)
    except RuntimeError:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        close = did_you_mean(tag, tags)
        raise ConfigError(
            f"architecture: timm's {name} has no weights tagged {tag!r}{close} Known: {', '.join(tags)}"
        ) from None
    if published is None:  # an architecture that was never published with weights
        return ImageSpec(height=224, width=224)
    _, height, width = published.input_size
    return ImageSpec(
        height=height,
        width=width,
        mean=tuple(published.mean),  # type: ignore[arg-type]
        std=tuple(published.std),  # type: ignore[arg-type]
        resize=_RESIZE.get(published.crop_mode or "center", "crop"),  # type: ignore[arg-type]
        interpolation=published.interpolation if published.interpolation in _INTERPOLATION else "bicubic",  # type: ignore
    )


def create(architecture: str, image: ImageSpec, options: dict[str, Any], **more: Any) -> nn.Module:
    """A timm model without classifier for images of this size. Raises `ConfigError` for arguments that it does not
    take."""
    options = dict(options)
    if "img_size" in options or "num_classes" in options:
        raise ConfigError(
            "options: img_size and num_classes are set by the toolkit; write image_size beside options instead"
        )
    published = timm.models.get_pretrained_cfg(architecture)
    size = (image.height, image.width)
    native = tuple(published.input_size[1:]) if published is not None else None
    if native is None or (size != native and published is not None and published.fixed_input_size):
        options["img_size"] = size
    try:
        return timm.create_model(architecture, **{"pretrained": False, "num_classes": 0, **more, **options})
    except TypeError as error:
        hint = f" It takes no other image_size than {native}." if "img_size" in str(error) else ""
        raise ConfigError(f"options: timm's {architecture} does not build with {options}: {error}.{hint}") from error


def depth_of(model: nn.Module) -> int:
    """Number of feature layers (blocks or stages)."""
    return int(getattr(model, "num_layers_before_cut", 0)) or len(model.feature_info)  # type: ignore[arg-type]


def cut(model: nn.Module, config: EncoderConfig) -> None:
    """Drop the blocks after the deepest one that is needed, and the last norm where it is not. In place."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"architecture: timm's {type(model).__name__} gives no intermediate features (no forward_intermediates); "
            "choose another model"
        )
    depth = depth_of(model)
    counts = take_layers(config.layers, depth, lowest=1)
    model.num_layers_before_cut = depth  # type: ignore[assignment]
    uses_norm = config.final_norm and depth in counts
    if hasattr(model, "prune_intermediate_layers"):
        prune: Any = model.prune_intermediate_layers
        prune([k - 1 for k in sorted(set(counts))], prune_norm=not uses_norm, prune_head=True)


def timm_layers(model: nn.Module, pixels: Tensor, config: EncoderConfig) -> list[LayerOutput]:
    """Outputs of ``config.layers``; blocks after the deepest one do not run."""
    depth = depth_of(model)
    forward: Any = model.forward_intermediates
    counts = take_layers(config.layers, depth, lowest=1)
    wanted = sorted(set(counts))
    uses_norm = config.final_norm and depth in wanted
    num_prefix = getattr(model, "num_prefix_tokens", 0) or 0
    grid: Grid | None = config.resolved_info.grid if config.resolved_info.grid != (1, 1) else None
    # Tokens straight from the blocks save a copy; only these classes hand them out, and only on one grid.
    as_tokens = grid is not None and isinstance(model, VisionTransformer | Eva)
    options: dict[str, Any] = {"output_fmt": "NLC" if as_tokens else "NCHW"}
    takes_prefix = "return_prefix_tokens" in inspect.signature(forward).parameters
    if config.keep_prefix and num_prefix and takes_prefix:
        options["return_prefix_tokens"] = True
    result: Any = forward(
        pixels, indices=[k - 1 for k in wanted], stop_early=True, intermediates_only=not uses_norm, **options
    )
    final, maps = result if uses_norm else (None, result)
    outputs: dict[int, LayerOutput] = {}
    for count, item in zip(wanted, maps):
        feature_map, prefix = item if isinstance(item, tuple) else (item, None)
        if feature_map.ndim == 3:
            assert grid is not None
            outputs[count] = LayerOutput(feature_map, grid, prefix)
        else:
            outputs[count] = map_to_tokens(feature_map)
            outputs[count].prefix = prefix
    if uses_norm:
        outputs[depth] = _final(model, final, outputs[depth], num_prefix)
    return [outputs[count] for count in counts]


def _final(model: Any, final: Any, before: LayerOutput, num_prefix: int) -> LayerOutput:
    """timm's `forward_features` output in the layout of the last block's output."""
    if not isinstance(final, Tensor):
        raise ConfigError(f"final_norm: timm's {type(model).__name__} ends in several branches; set final_norm: false")
    if final.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            final = final.permute(0, 3, 1, 2)
        return map_to_tokens(final)
    num_tokens = before.tokens.shape[1]
    if final.ndim != 3 or final.shape[1] not in (num_tokens, num_tokens + num_prefix):
        raise ConfigError(
            f"final_norm: timm's {type(model).__name__} ends with {tuple(final.shape)}, which is no grid of "
            f"{num_tokens} tokens; set final_norm: false"
        )
    split = final.shape[1] - num_tokens
    prefix = final[:, :split] if before.prefix is not None and split else None
    return LayerOutput(final[:, split:], before.grid, prefix)


def set_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch activation checkpointing of a timm or open_clip model."""
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not offer it")
    switch: Any = model.set_grad_checkpointing
    switch(enabled)


def load_timm(
    model: nn.Module,
    state: dict[str, Tensor],
    architecture: str,
    image: ImageSpec,
    options: dict[str, Any],
    source: str,
) -> None:
    """Copy a checkpoint of a timm architecture, in timm's naming or the original authors', of any image size."""
    with torch.device("meta"):
        full = create(architecture, image, options)
    wanted = full.state_dict()
    convert = getattr(sys.modules[type(full).__module__], "checkpoint_filter_fn", None)
    if not set(model.state_dict()) <= set(state):
        stripped = strip_prefix(state, set(wanted))
        state = stripped if set(model.state_dict()) <= set(stripped) else state
    if convert is not None:
        try:
            state = convert(dict(state), model)
        except TypeError:
            state = convert(dict(state))
        except (KeyError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"weights: {source} is no checkpoint of {architecture} ({error})") from error
    load_exactly(model, _resize_sam_positions(state, model), source=source, known=wanted)


def _resize_sam_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position tables that lie as an image ``(1, rows, cols, D)`` or along one axis ``(2 * size - 1, D)``, which timm
    resizes on use but not on load."""
    own = model.state_dict()
    result = dict(state)
    for key, value in state.items():
        if key not in own or own[key].shape == value.shape:
            continue
        if key == "pos_embed" and value.ndim == 4 and own[key].ndim == 4:
            result[key] = resample_abs_pos_embed_nhwc(value, list(own[key].shape[1:3]))
        elif key.endswith(("rel_pos_h", "rel_pos_w")) and value.ndim == 2:
            resized = F.interpolate(value.float().T[None], size=own[key].shape[0], mode="linear")
            result[key] = resized[0].T.to(value.dtype)
    return result
