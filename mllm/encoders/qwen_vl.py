"""Which tokens do Qwen-VL's vision towers make of pictures at their own size (window attention, 2-D rotary positions)?"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders import hf_weights
from mllm.encoders.base import EncoderConfig
from mllm.encoders.hf_models import checkpoint_layers, keep_own_names, vision_config
from mllm.encoders.library import ImageEncoderConfig, LayerOutput, LibraryEncoder, to_patches
from mllm.encoders.packed import VARLEN, packed
from mllm.encoders.weights import load_exactly, local_path, read_weights, strip_prefix, unavailable
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, VisionFeatures

_CLIP: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_TOWERS = {
    "qwen2_5_vl_vision": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "out_hidden_size"),
    "qwen2_vl_vision": ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "hidden_size"),
}
"""``model_type`` → module and class of transformers, and the setting that says how wide its tokens are."""


class QwenVlConfig(ImageEncoderConfig):
    """The vision tower of Qwen2.5-VL (arXiv 2502.13923) or Qwen2-VL (arXiv 2409.12191), its merger included: one token is
    ``spatial_merge_size``² patches. Made for ``views: {type: native, rule: qwen}``; the authors put no connector behind it
    (``{type: linear}`` here)."""

    architecture: dict[str, Any] | None = None
    """HF config: ``model_type: qwen2_5_vl_vision`` (or ``qwen2_vl_vision``) and sizes. Default: read once from
    ``weights.source``, then kept here."""
    image_size: int | tuple[int, int] | None = Field(default=None)
    """Where views are not native; default 448, or the next multiple of a token's side."""

    @property
    def known_architecture(self) -> dict[str, Any]:
        """`architecture`, of a config that is complete."""
        assert self.architecture is not None, "the config of a qwen_vl encoder is not complete"
        return self.architecture


class QwenVlEncoder(LibraryEncoder):
    """Patches attend within windows, in some layers within the whole picture; tokens come out in raster order."""

    Config: ClassVar[type[EncoderConfig]] = QwenVlConfig

    config: QwenVlConfig

    def __init__(self, config: QwenVlConfig):
        super().__init__(config)
        self._merge, self._patch, self._frames = _sizes(vision_config(self.config.known_architecture))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "qwen_vl",
            "architecture": {
                "model_type": "qwen2_5_vl_vision",
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 24,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_size": [32, 40],
        }

    @classmethod
    def complete(cls, config: QwenVlConfig) -> Any:
        if config.architecture is not None:
            return config
        if config.weights is None:
            raise ConfigError("architecture: give an HF config {model_type: …}, or weights: {source: hub id or folder}")
        architecture, found = hf_weights.read_published_config(config.weights)
        preset = {key: value for key, value in found.items() if getattr(config, key) is None}
        return config.model_copy(update={"architecture": architecture, **preset})

    @classmethod
    def resolve(cls, config: QwenVlConfig) -> Any:
        config = cls.complete(config)
        full = vision_config(config.known_architecture)
        if full.model_type not in _TOWERS:
            raise ConfigError(
                f"architecture.model_type: {full.model_type} is no tower of {', '.join(_TOWERS)}; use type hf for others"
            )
        if config.layers != [-1] or config.keep_prefix or not config.final_norm:
            raise ConfigError(
                "layers: a qwen_vl encoder gives its merger's output, so layers stays [-1], final_norm true and keep_prefix false"
            )
        merge, patch, _ = _sizes(full)
        unit = merge * patch
        side = max(round(448 / unit), 1) * unit
        image = config.image(ImageSpec(height=side, width=side, patch=unit, **_CLIP))
        if image.height % unit or image.width % unit:
            raise ConfigError(
                f"image_size: ({image.height}, {image.width}) is no multiple of {unit}, the side of a token"
            )
        architecture = {**config.known_architecture, "model_type": full.model_type}
        if "vision_config" in architecture:
            architecture = {**full.to_diff_dict(), "model_type": full.model_type}
        grid = (image.height // unit, image.width // unit)
        info = EncoderInfo(image=image, grid=grid, width=getattr(full, _TOWERS[full.model_type][2]))
        return config.model_copy(update={"architecture": architecture, "info": info})

    @classmethod
    def build(cls, config: QwenVlConfig) -> nn.Module:
        full = vision_config(config.known_architecture)
        module, name, _ = _TOWERS[full.model_type]
        tower = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
        model = tower._from_config(full, attn_implementation="sdpa")
        keep_own_names(model)
        return model

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        grid = self.config.resolved_info.grid
        tokens = self._run(to_patches(pixels, self._merge * self._patch), [grid] * len(pixels))
        return [LayerOutput(tokens.view(len(pixels), grid[0] * grid[1], -1), grid)]

    def read_native(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """All pictures at once; none sees another, and none is padded."""
        tokens = self._run(patches, grids) if grids else patches.new_zeros(0, self.config.resolved_info.width)
        return VisionFeatures(tokens[None], (1, len(tokens)), grids=tuple(grids))

    def load_pretrained(self) -> None:
        weights = self.required_weights()
        path, own = local_path(weights.source), set(self.model.state_dict())
        if path is None:
            from huggingface_hub import snapshot_download

            try:
                path = Path(
                    snapshot_download(weights.source, revision=weights.revision, allow_patterns=["*.safetensors*"])
                )
            except Exception as error:
                raise unavailable(weights.source, error) from error
        state = strip_prefix(read_weights(path), own)
        load_exactly(self.model, state, source=weights.source)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        checkpoint_layers(self.model, enabled)

    def _run(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Squares ``(ΣN, 3 (merge · p)²)`` of pictures with these grids → ``(ΣN, D)``."""
        merge, side = self._merge, self._patch
        cells = patches.view(-1, 3, merge, side, merge, side).permute(0, 2, 4, 1, 3, 5)
        still = cells.reshape(-1, 3, 1, side, side).expand(
            -1, -1, self._frames, -1, -1
        )  # a picture is shown to both frames
        if patches.is_meta:
            return self._products(still.flatten(1))
        shapes = [(1, rows * merge, columns * merge) for rows, columns in grids]
        with packed(self.model, VARLEN):
            found = self.model(still.flatten(1), grid_thw=torch.tensor(shapes, device=patches.device))
        return found.pooler_output

    def _products(self, patches: Tensor) -> Tensor:
        """The tower's products alone, for a plan on the meta device: where patches stand and which see each other are values, which that
        device has none of. Attention's own are left out."""
        model: Any = self.model
        x = model.patch_embed(patches)
        for block in model.blocks:
            x = x + block.attn.proj(block.attn.qkv(block.norm1(x))[..., : x.shape[-1]])
            x = x + block.mlp(block.norm2(x))
        return model.merger(x)


def _sizes(full: Any) -> tuple[int, int, int]:
    """Patches of a token's side, pixels of a patch's side, frames of a patch."""
    sizes = (full.spatial_merge_size, full.patch_size, full.temporal_patch_size)
    merge, patch, frames = (size[0] if isinstance(size, (list, tuple)) else size for size in sizes)
    return merge, patch, frames
