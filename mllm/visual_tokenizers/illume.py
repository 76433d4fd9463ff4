"""How does ILLUME+ write an image: semantic codes of a frozen encoder beside pixel codes on a finer grid?"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.types import Grid, VisualCodes
from mllm.visual_tokenizers.base import (
    TokenizerOutput,
    VisualTokenizer,
    VisualTokenizerConfig,
    pixel_spec,
    sum_losses,
    tag_usage,
    to_map,
    to_tokens,
)
from mllm.visual_tokenizers.encoder import FeatureEncoder
from mllm.visual_tokenizers.networks.convolution import ConvolutionalDecoder, ConvolutionalEncoder, ConvolutionConfig
from mllm.visual_tokenizers.networks.transformer import RotaryTransformer
from mllm.visual_tokenizers.quantizers import QuantizerField, QuantizerOutput, build_quantizer
from mllm.visual_tokenizers.tokenflow import EncoderSettings


class IllumeConfig(VisualTokenizerConfig):
    """DualViTok of ILLUME+ (arXiv 2504.01934), the public stand-in for FOCUS's tokenizer (arXiv 2506.16806)."""

    type: str = "illume"
    image_size: int = Field(gt=0)
    semantic_encoder: EncoderSettings
    """Frozen; its layer-normalised features are what the semantic codes must say."""
    semantic_width: int = Field(default=1280, ge=1)
    semantic_depth: int = Field(default=4, ge=0)
    semantic_heads: int = Field(default=16, ge=1)
    semantic_quantizer: QuantizerField
    pixel_encoder: ConvolutionConfig = Field(default_factory=lambda: ConvolutionConfig(sampling="shuffle"))
    z_channels: int = Field(default=256, ge=1)
    pixel_quantizer: QuantizerField
    decoder: ConvolutionConfig = Field(default_factory=lambda: ConvolutionConfig(channels=384))
    noise_images: float = Field(default=0.0, ge=0, le=1)
    """Training: share of images that get noise in their pixel codes (0.1 in the fixed-256 config)."""
    noise_positions: float = Field(default=0.1, ge=0, le=1)
    """Share of such an image's positions whose vector is the previous image's at the same place."""


class Illume(VisualTokenizer):
    """Two codebooks: ``semantic`` on the encoder's grid and ``pixel`` on the finer convolutional one."""

    name = "illume"
    Config = IllumeConfig
    config: IllumeConfig

    def __init__(self, config: IllumeConfig):
        super().__init__(config)
        self.image = pixel_spec(config.image_size)
        side = config.image_size // config.pixel_encoder.factor
        self.grid = (side, side)
        self.semantic_encoder = FeatureEncoder(config.semantic_encoder).requires_grad_(False).eval()
        self.semantic_grid: Grid = tuple(self.semantic_encoder.grid)  # type: ignore[assignment]
        self.semantic_quantizer = build_quantizer(config.semantic_quantizer)
        self.pixel_quantizer = build_quantizer(config.pixel_quantizer)
        semantic_dim, pixel_dim = self.semantic_quantizer.dim, self.pixel_quantizer.dim
        self.codebooks = {
            "semantic": (self.semantic_quantizer.size, self.semantic_quantizer.num_codes),
            "pixel": (self.pixel_quantizer.size, self.pixel_quantizer.num_codes),
        }
        width, depth, heads = config.semantic_width, config.semantic_depth, config.semantic_heads
        source = self.semantic_encoder.width
        self.semantic_down = RotaryTransformer(source, width, semantic_dim, depth, heads)
        self.semantic_up = RotaryTransformer(semantic_dim, width, source, depth, heads, final_norm=True)
        self.pixel_encoder = ConvolutionalEncoder(config.pixel_encoder, config.z_channels)
        self.to_pixel = nn.Conv2d(config.z_channels, pixel_dim, 1)
        merged = semantic_dim + pixel_dim
        self.from_codes = nn.Conv2d(merged, config.z_channels, 1)
        self.decoder = ConvolutionalDecoder(config.decoder, config.z_channels, condition_channels=merged)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        convolution = {"channels": 16, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8}
        frozen = {"codebook": {"learn": "frozen_linear"}}
        return {
            "type": "illume",
            "image_size": 16,
            "semantic_encoder": {
                "type": "small_vit",
                "image_size": 16,
                "patch_size": 8,
                "width": 24,
                "depth": 1,
                "heads": 2,
            },
            "semantic_width": 16,
            "semantic_depth": 1,
            "semantic_heads": 2,
            "semantic_quantizer": {"type": "vq", "size": 16, "parts": {"semantic": 8}, **frozen},
            "pixel_encoder": {**convolution, "sampling": "shuffle"},
            "z_channels": 16,
            "pixel_quantizer": {"type": "vq", "size": 32, "parts": {"pixel": 8}, **frozen},
            "decoder": convolution,
            "noise_images": 0.5,
            "noise_positions": 0.5,
        }

    @property
    def grids(self) -> dict[str, Grid]:
        return {"semantic": self.semantic_grid, "pixel": self.grid}

    @property
    def embed_dims(self) -> dict[str, int]:
        return {"semantic": self.semantic_quantizer.dim, "pixel": self.pixel_quantizer.dim}

    def train(self, mode: bool = True) -> Illume:
        super().train(mode)
        self.semantic_encoder.eval()
        return self

    def load_pretrained(self) -> None:
        self.semantic_encoder.load_pretrained()

    @torch.no_grad()
    def semantic_target(self, pixels: Tensor) -> Tensor:
        """The frozen encoder's features, normalised per token without learned scale ``(B, N, width)``."""
        features = self.semantic_encoder(pixels).float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6)

    def _encode(self, pixels: Tensor) -> tuple[QuantizerOutput, QuantizerOutput, Tensor]:
        pixels = self.check_pixels(pixels)
        target = self.semantic_target(pixels)
        semantic = self.semantic_quantizer(self.semantic_down(target.to(self.dtype), self.semantic_grid))
        pixel = self.pixel_quantizer(to_tokens(self.to_pixel(self.pixel_encoder(pixels))))
        return semantic, pixel, target

    def _noisy(self, vectors: Tensor) -> Tensor:
        if not self.training or self.config.noise_images == 0 or len(vectors) < 2:
            return vectors
        chosen = torch.rand(len(vectors), 1, device=vectors.device) < self.config.noise_images
        places = torch.rand(vectors.shape[:2], device=vectors.device) < self.config.noise_positions
        return torch.where((chosen & places)[..., None], vectors.detach().roll(1, 0), vectors)

    def _pixels(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        semantic, pixel = semantic.to(self.dtype), pixel.to(self.dtype)
        semantic_map = to_map(semantic, self.semantic_grid)
        if self.semantic_grid != self.grid:
            semantic_map = F.interpolate(semantic_map, size=self.grid, mode="bicubic")
        merged = torch.cat([semantic_map, to_map(pixel, self.grid)], 1)
        return self.decoder(self.from_codes(merged), merged)

    def _codes(self, semantic: Tensor, pixel: Tensor) -> VisualCodes:
        return VisualCodes({"semantic": semantic, "pixel": pixel}, self.grid)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> VisualCodes:
        semantic, pixel, _ = self._encode(pixels)
        return self._codes(semantic.codes, pixel.codes)

    def quantized(self, pixels: Tensor) -> tuple[VisualCodes, dict[str, Tensor]]:
        semantic, pixel, _ = self._encode(pixels)
        return self._codes(semantic.codes, pixel.codes), {"semantic": semantic.quantized, "pixel": pixel.quantized}

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        self.check_codes(codes)
        return {
            "semantic": self.semantic_quantizer.embed(codes.codes["semantic"]),
            "pixel": self.pixel_quantizer.embed(codes.codes["pixel"]),
        }

    def code_vectors(self, name: str, codes: Tensor) -> Tensor:
        return (self.pixel_quantizer if name == "pixel" else self.semantic_quantizer).code_vectors(codes)

    def semantic_tokens(self, codes: VisualCodes) -> Tensor:
        """codes → the frozen encoder's features as the semantic decoder sees them ``(B, N, width)``."""
        return self.semantic_up(self.embed(codes)["semantic"].to(self.dtype), self.semantic_grid)

    def decode(self, codes: VisualCodes) -> Tensor:
        vectors = self.embed(codes)
        return self._pixels(vectors["semantic"], vectors["pixel"])

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        semantic, pixel, target = self._encode(pixels)
        tokens = self.semantic_up(semantic.quantized.to(self.dtype), self.semantic_grid)
        losses = sum_losses({"semantic": semantic.losses, "pixel": pixel.losses})
        losses["semantic"] = (1 - F.cosine_similarity(tokens.float(), target, dim=-1)).mean()
        return TokenizerOutput(
            self._pixels(semantic.quantized, self._noisy(pixel.quantized)),
            self._codes(semantic.codes, pixel.codes),
            losses,
            {"tokens": tokens},
            {**tag_usage("semantic", semantic.usage), **tag_usage("pixel", pixel.usage)},
        )

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]
