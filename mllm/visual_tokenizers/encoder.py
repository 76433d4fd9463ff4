"""How does a tokenizer use a vision encoder: as student, as frozen source of features, or as teacher?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import StrictModel, validate
from mllm.damage import naming_damage, read_safetensors
from mllm.errors import CheckpointError, ConfigError
from mllm.noise import load_report_unless_told
from mllm.types import Grid, WeightsSource
from mllm.visual_tokenizers.networks.transformer import Block


class SmallVitConfig(StrictModel):
    """A plain vision transformer trained from scratch, for tokenizers that start from no published encoder."""

    type: str = "small_vit"
    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    width: int = Field(gt=0)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    weights: str | None = None
    """Safetensors file with its weights (a teacher that was trained before); None: from scratch."""


class SmallVit(nn.Module):
    """Pixels in [-1, 1] → tokens ``(B, N, width)``."""

    def __init__(self, config: SmallVitConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise ConfigError(
                f"small_vit: image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
            )
        side = config.image_size // config.patch_size
        self.grid: Grid = (side, side)
        self.width = config.width
        self.patches = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.randn(1, side * side, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.weights = config.weights

    def load_pretrained(self) -> None:
        """The weights its config names; nothing without any."""
        if self.weights is None:
            return
        if not Path(self.weights).is_file():
            raise CheckpointError(f"small_vit.weights: {self.weights} does not exist")
        try:
            self.load_state_dict(read_safetensors(self.weights))
        except RuntimeError as error:
            raise CheckpointError(f"small_vit.weights: {self.weights} does not fit: {error}") from error

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class QwenVisionConfig(StrictModel):
    """The vision part of Qwen2-VL with its 2 × 2 merger (arXiv 2409.12191), ILLUME+'s semantic encoder."""

    type: str = "qwen2_vl_vision"
    image_size: int = Field(gt=0)
    """A multiple of patch size × merge size (28): 252 gives 9 × 9 tokens."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers' Qwen2-VL vision config: depth, embed_dim, hidden_size, num_heads …"""
    weights: WeightsSource | None = None
    """A folder or hub id that holds the vision model by itself."""


class QwenVision(nn.Module):
    """Pixels normalised as CLIP's → merged tokens ``(B, N, hidden_size)``."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        self.config = config
        vision: Any = Qwen2VLVisionConfig(**config.architecture)
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        unit = self.patch * self.merge
        if config.image_size % unit:
            raise ConfigError(f"qwen2_vl_vision: image_size {config.image_size} is not a multiple of {unit}")
        self.grid: Grid = (config.image_size // unit, config.image_size // unit)
        self.width = vision.hidden_size
        self.model = Qwen2VisionTransformerPretrainedModel._from_config(vision)

    @load_report_unless_told()
    def load_pretrained(self) -> None:
        """Read the published weights. Raises `CheckpointError` when the source lacks some."""
        weights = self.config.weights
        if weights is None:
            return
        cls: Any = type(self.model)
        try:
            with naming_damage(weights.source):
                model, found = cls.from_pretrained(
                    weights.source, revision=weights.revision, config=self.model.config, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"qwen2_vl_vision.weights: {weights.source!r} cannot be read ({reason})") from error
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"])[:3])
            raise CheckpointError(
                f"qwen2_vl_vision.weights: {weights.source!r} lacks {missing} …; save the vision part alone"
            )
        self.model.load_state_dict(model.state_dict())

    def restore_buffers(self) -> None:
        """Rotary frequencies are not saved."""
        rotary: Any = self.model.rotary_pos_emb
        device = self.model.patch_embed.proj.weight.device
        try:
            fresh = type(rotary)(self.model.config)
        except TypeError:  # transformers before the config became the argument
            fresh = type(rotary)(self.model.config.embed_dim // self.model.config.num_heads // 2)
        self.model.rotary_pos_emb = fresh.to(device)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels = pixels.shape[:2]
        rows, columns = self.grid
        if batch == 0:
            return pixels.new_zeros(0, rows * columns, self.width)
        # Patches in the order of the merger: 2 × 2 neighbours one after the other; a still image is two equal frames.
        x = pixels.reshape(batch, channels, rows, self.merge, self.patch, columns, self.merge, self.patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1)
        grid = torch.tensor([[1, rows * self.merge, columns * self.merge]], device=pixels.device).expand(batch, -1)
        out = self.model(x.reshape(-1, channels * self.frames * self.patch**2), grid_thw=grid)
        tokens = out if isinstance(out, Tensor) else out.pooler_output
        return tokens.view(batch, rows * columns, self.width)


_OWN: dict[str, tuple[type[StrictModel], type[nn.Module]]] = {
    "small_vit": (SmallVitConfig, SmallVit),
    "qwen2_vl_vision": (QwenVisionConfig, QwenVision),
}
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def encoder_settings(value: Any) -> dict[str, Any]:
    """The self-sufficient plain form of an encoder's config: ``small_vit``, ``qwen2_vl_vision``, or any registered
    encoder's config or shipped entry."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in _OWN:
        return validate(_OWN[kind][0], value, where=kind).model_dump(mode="json")
    from mllm.encoders.catalogue import encoder_config

    return encoder_config(value, where="encoder").model_dump(mode="json")


class FeatureEncoder(nn.Module):
    """A vision encoder that takes a tokenizer's pixels (in [-1, 1], any size) and gives its patch tokens.

    normalise: re-normalise to the encoder's own mean and std; False feeds [-1, 1] as it is (TokenFlow's CLIP student).
    """

    def __init__(self, settings: Mapping[str, Any], *, normalise: bool = True):
        super().__init__()
        self.normalise = normalise
        kind = settings.get("type")
        if kind in _OWN:
            config_class, cls = _OWN[kind]
            own: Any = validate(config_class, settings, where=kind)
            self.encoder: Any = cls(own)
            self.size: Grid = (own.image_size, own.image_size)
            self.grid, self.width = self.encoder.grid, self.encoder.width
            self.mean, self.std = _CLIP if kind == "qwen2_vl_vision" else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
            return
        from mllm.encoders import ENCODERS
        from mllm.encoders.catalogue import encoder_config

        config = encoder_config(settings, where="encoder")
        cls = ENCODERS.get(config.type)
        info = cls.describe(config)
        self.encoder = cls(config)
        self.size = (info.image.height, info.image.width)
        self.grid, self.width = tuple(info.grid), info.width
        self.mean, self.std = info.image.mean, info.image.std

    def load_pretrained(self) -> None:
        """The published weights its config names; nothing for one trained from scratch."""
        config = getattr(self.encoder, "config", None)
        if config is None or config.weights is not None:
            self.encoder.load_pretrained()

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [-1, 1] → ``(B, N, width)``."""
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
        if self.normalise and not (self.mean == (0.5, 0.5, 0.5) == self.std):
            mean = pixels.new_tensor(self.mean).view(3, 1, 1)
            std = pixels.new_tensor(self.std).view(3, 1, 1)
            pixels = (pixels * 0.5 + 0.5 - mean) / std
        features = self.encoder(pixels)
        return features if isinstance(features, Tensor) else features.tokens


def resize_tokens(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens ``(B, N, D)`` of one grid on another, bilinear, fp32."""
    if tuple(old) == tuple(new):
        return tokens
    maps = tokens.float().transpose(1, 2).unflatten(2, old)
    return F.interpolate(maps, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
