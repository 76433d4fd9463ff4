"""Which features does a vision model of transformers give?"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm.encoders import hf_weights
from mllm.encoders.base import EncoderConfig
from mllm.encoders.hf_models import (
    NOISE,
    checkpoint_layers,
    cut_blocks,
    final_norms,
    keep_own_names,
    new_model,
    num_blocks,
    patch_size,
    published_image,
    set_image_size,
    vision_config,
)
from mllm.encoders.library import (
    ImageEncoderConfig,
    LayerOutput,
    LibraryEncoder,
    find_blocks,
    map_to_tokens,
    merge_layers,
    take_layers,
)
from mllm.encoders.packed import packed
from mllm.encoders.weights import load_exactly
from mllm.errors import ConfigError, UnavailableError
from mllm.types import Grid, ImageSpec, VisionFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NATIVE = "siglip2_vision_model"


class HfConfig(ImageEncoderConfig):
    """A vision model of transformers, or the vision part of a model that has one."""

    architecture: dict[str, Any] | None = None
    """HF config: ``model_type`` and sizes. Default: read once from ``weights.source``, then kept here."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @property
    def known_architecture(self) -> dict[str, Any]:
        """`architecture`, of a config that is complete."""
        assert self.architecture is not None, "the config of an hf encoder is not complete"
        return self.architecture


class HfEncoder(LibraryEncoder):
    """CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, C-RADIO, TIPSv2, SAM, Pix2Struct … by config.

    Layers are the blocks' plain outputs, HF's ``hidden_states``. With ``final_norm`` the last of them passes through
    the model's last norm as well, which HF applies to the class token only (CLIP) or to everything (SigLIP, DINOv2).
    """

    Config: ClassVar[type[EncoderConfig]] = HfConfig
    config: HfConfig

    def __init__(self, config: HfConfig):
        super().__init__(config)
        self._captured: dict[str, Any] | None = None
        self._attention: Tensor | None = None
        path, blocks = find_blocks(self.model)
        assert blocks is not None
        self._deepest = f"{path}.{len(list(blocks.children())) - 1}"
        self._depth = num_blocks(self.config.known_architecture)
        self._counts = take_layers(self.config.layers, self._depth)
        self._norm = next(iter(final_norms(self.model)), None)
        modules = list(blocks.children())
        if 0 in self._counts:
            modules[0].register_forward_pre_hook(partial(_capture_input, self), with_kwargs=True)
        for count in sorted(set(self._counts) - {0}):
            modules[count - 1].register_forward_hook(partial(_capture_output, self, count))
        for module in _attention_modules(modules[-1]):
            module.register_forward_hook(partial(_capture_attention, self))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "hf",
            "architecture": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "layers": [-2],
            "keep_prefix": True,
        }

    @classmethod
    def complete(cls, config: HfConfig) -> HfConfig:
        architecture = config.architecture
        if architecture is None:
            if config.weights is None:
                raise ConfigError(
                    "architecture: give an HF config {model_type: …}, or weights: {source: hub id or folder}"
                )
            architecture, found = hf_weights.read_published_config(config.weights)
            preset = {key: value for key, value in found.items() if getattr(config, key) is None}
            config = config.model_copy(update={"architecture": architecture, **preset})
        full = vision_config(architecture)
        if full.model_type != architecture.get("model_type"):
            plain = {k: v for k, v in full.to_diff_dict().items() if k not in NOISE}
            config = config.model_copy(update={"architecture": {"model_type": full.model_type, **plain}})
        return config

    @classmethod
    def default_image(cls, config: HfConfig) -> ImageSpec:
        normalised = config.mean is not None and config.std is not None
        full = vision_config(config.known_architecture)
        image = published_image(full, normalised=normalised)
        return image.model_copy(update={"patch": full.patch_size}) if full.model_type == _NATIVE else image

    @classmethod
    def build(cls, config: HfConfig) -> nn.Module:
        full = vision_config(config.known_architecture)
        set_image_size(full, config.resolved_info.image)
        model = new_model(full, config.attention)
        _, blocks = find_blocks(model)
        if blocks is None:
            raise ConfigError(f"architecture: {full.model_type} has no numbered blocks; this model is not supported")
        depth = len(list(blocks.children()))
        counts = take_layers(config.layers, depth)
        cut_blocks(model, max(max(counts), 1))
        keep_own_names(model)
        if not (config.final_norm and depth in counts):
            for path, name in list(final_norms(model)):
                setattr(model.get_submodule(path), name, nn.Identity())
        return model

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        captured = self._run(pixels)
        patch = patch_size(self.model.config)
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        layers: dict[int, LayerOutput] = {}
        for count in set(self._counts):
            features = captured[f"layer {count}"]
            if count == self._depth and self.config.final_norm:
                features = self._apply_final_norm(features)
            layers[count] = self._as_tokens(features, grid)
        return [layers[count] for count in self._counts]

    def read_native(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """SigLIP 2 on all images at once: rows lie end to end, and attention stays within an image."""
        side, embeddings = self.model.config.patch_size, self.model.embeddings
        if not grids:
            return super().read_native(patches, grids)
        # Its patches list a pixel's channels side by side.
        x = embeddings.patch_embedding(patches.unflatten(1, (3, side * side)).transpose(1, 2).flatten(1))
        square = (embeddings.position_embedding_size,) * 2
        table = embeddings.position_embedding.weight.unflatten(0, square)
        shapes = [torch.tensor([grid], device="cpu") for grid in grids]
        places = [embeddings.resize_positional_embeddings(table, s, int(s.prod()))[0] for s in shapes]
        captured: dict[str, Any] = {}
        self._captured = captured
        try:
            lengths = torch.tensor([rows * columns for rows, columns in grids], device="cpu")
            with packed(self.model):
                self.model.encoder(inputs_embeds=(x + torch.cat(places))[None], attention_mask=lengths)
        finally:
            self._captured = None
        layers = []
        for count in self._counts:
            tokens = captured[f"layer {count}"]
            ends = count == self._depth and self.config.final_norm
            layers.append(LayerOutput(self._apply_final_norm(tokens) if ends else tokens, (1, len(patches))))
        features = merge_layers(layers, False)
        features.grids = tuple(grids)
        return features

    def read_layers_and_attention(self, pixels: Tensor) -> tuple[list[LayerOutput], Tensor]:
        """Runs the deepest block with HF's eager attention, the only one that hands out its weights."""
        deepest = self.model.get_submodule(self._deepest)
        modules = [module for module in _attention_modules(deepest) if hasattr(module, "config")]
        kept = [module.config for module in modules]
        for module in modules:
            eager = copy.copy(module.config)
            eager._attn_implementation_internal = "eager"
            module.config = eager
        try:
            layers = self.read_layers(pixels)
        finally:
            for module, config in zip(modules, kept):
                module.config = config
        attention = self._attention
        if attention is None:
            raise UnavailableError(f"return_attention: {self.model.config.model_type} hands out no attention weights")
        return layers, attention

    def empty_features(self, pixels: Tensor, *, return_attention: bool = False) -> VisionFeatures:
        features = super().empty_features(pixels)
        if return_attention:  # how many heads and prefix tokens there are, only a forward pass tells
            with torch.no_grad():
                _, attention = self.read_layers_and_attention(pixels.new_zeros(1, *pixels.shape[1:]))
            features.attention = attention[:0]
        return features

    def load_pretrained(self) -> None:
        weights = self.required_weights()
        donor = hf_weights.load_donor(self.model, vision_config(self.config.known_architecture), weights)
        state = hf_weights.fit_positions(donor, self.model, self.config.resolved_info.image)
        load_exactly(self.model, state, source=weights.source, known=state)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        checkpoint_layers(self.model, enabled)

    def _run(self, pixels: Tensor) -> dict[str, Tensor]:
        captured: dict[str, Any] = {}
        self._captured = captured
        try:
            if self.model.config.model_type == "pix2struct_vision_model":
                # Its own forward would build a mask from the pixels and wait for the device; there is no padding here.
                x = self.model.embeddings(_pix2struct_patches(pixels, self.model.config))
                takes_none = hasattr(self.model.encoder.layer[0].attention, "scaling")
                # Older transformers require a mask; ones hide nothing.
                self.model.encoder(x, attention_mask=None if takes_none else x.new_ones(x.shape[:2]))
            else:
                self.model(**_model_inputs(self.model, pixels))
        finally:
            self._captured = None  # a checkpointed block runs again in the backward pass
        self._attention = captured.pop("attention", None)
        return captured

    def _apply_final_norm(self, features: Tensor) -> Tensor:
        if self._norm is None:
            return features
        path, name = self._norm
        norm = getattr(self.model.get_submodule(path), name)
        if name == "neck":  # SAM: channels last in, channels first out
            return norm(features).permute(0, 2, 3, 1)
        if features.ndim == 4 and hasattr(self.model.config, "hidden_sizes"):
            return norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return norm(features)

    def _as_tokens(self, features: Tensor, grid: tuple[int, int]) -> LayerOutput:
        if features.ndim == 4:
            channels_first = hasattr(self.model.config, "hidden_sizes")
            return map_to_tokens(features if channels_first else features.permute(0, 3, 1, 2))
        num_prefix = features.shape[1] - grid[0] * grid[1]
        if num_prefix < 0:
            raise ConfigError(
                f"architecture: {self.model.config.model_type} gives {features.shape[1]} tokens, fewer than the "
                f"{grid} grid of its patches; use type: timm for hierarchical models"
            )
        return LayerOutput(features[:, num_prefix:], grid, features[:, :num_prefix] if num_prefix else None)


def _model_inputs(model: Any, pixels: Tensor) -> dict[str, Any]:
    config = model.config
    if config.model_type == "siglip2_vision_model":
        patches, rows, cols = _patches_last_channel(pixels, config.patch_size)
        # One shape for all images: its position table broadcasts over the batch.
        return {
            "pixel_values": patches,
            "pixel_attention_mask": None,
            "spatial_shapes": torch.tensor([[rows, cols]], device="cpu"),
        }
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if pixels.shape[2] != pixels.shape[3] and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        inputs["interpolate_pos_encoding"] = True
    return inputs


def _patches_last_channel(pixels: Tensor, size: int) -> tuple[Tensor, int, int]:
    """``(B, 3, H, W)`` → ``(B, N, size * size * 3)``, each patch row by row, a pixel's channels side by side."""
    batch, channels, height, width = pixels.shape
    rows, cols = height // size, width // size
    patches = pixels[..., : rows * size, : cols * size].reshape(batch, channels, rows, size, cols, size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, size * size * channels), rows, cols


def _pix2struct_patches(pixels: Tensor, config: PreTrainedConfig) -> Tensor:
    """Patches of an image standardised by its own mean and deviation, each led by its row and column (from 1)."""
    values = pixels.float()
    deviation = values.std(dim=(1, 2, 3), keepdim=True).clamp_min(values[0].numel() ** -0.5)
    values = (values - values.mean(dim=(1, 2, 3), keepdim=True)) / deviation
    patches, rows, cols = _patches_last_channel(values, patch_size(config))
    if max(rows, cols) >= min(config.seq_len, 257):  # bf16 holds whole numbers up to 256
        raise ConfigError(
            f"image_size: Pix2Struct takes at most {min(config.seq_len, 257) - 1} patches a side, got {rows} x {cols}"
        )
    row = torch.arange(1, rows + 1, device=pixels.device).repeat_interleave(cols)
    col = torch.arange(1, cols + 1, device=pixels.device).repeat(rows)
    place = torch.stack([row, col], dim=-1).to(patches.dtype).expand(len(pixels), -1, -1)
    return torch.cat([place, patches], dim=-1).to(pixels.dtype)


def _attention_modules(block: nn.Module) -> list[Any]:
    return [module for module in block.modules() if type(module).__name__.endswith("Attention")]


def _capture_input(encoder: HfEncoder, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if encoder._captured is not None:
        encoder._captured["layer 0"] = args[0] if args else kwargs["hidden_states"]


def _capture_output(encoder: HfEncoder, count: int, module: nn.Module, args: Any, output: Any) -> None:
    if encoder._captured is not None:
        encoder._captured[f"layer {count}"] = output[0] if isinstance(output, tuple) else output


def _capture_attention(encoder: HfEncoder, module: nn.Module, args: Any, output: Any) -> None:
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if encoder._captured is not None and isinstance(weights, Tensor):
        encoder._captured["attention"] = weights
