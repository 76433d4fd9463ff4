"""What is the plain baseline: one codebook between a convolutional encoder and decoder?"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.types import VisualCodes
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
from mllm.visual_tokenizers.networks.convolution import ConvolutionalDecoder, ConvolutionalEncoder, ConvolutionConfig
from mllm.visual_tokenizers.networks.transformer import CodeTransformer, tanh_bottleneck
from mllm.visual_tokenizers.quantizers import QuantizerField, build_quantizer


class SemanticHeadConfig(StrictModel):
    """Transformer from code vectors to the teacher's features."""

    teacher_dim: int = Field(ge=1)
    width: int = Field(default=768, ge=1)
    depth: int = Field(default=3, ge=0)
    heads: int = Field(default=12, ge=1)


class SemanticHead(nn.Module):
    """Code vectors ``(B, N, C)`` → ``(B, N, teacher_dim)`` (TokenFlow: three blocks, then linear, tanh, linear)."""

    def __init__(self, config: SemanticHeadConfig, in_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.transformer = CodeTransformer(in_dim, config.width, config.depth, config.heads, grid)
        self.out = tanh_bottleneck(config.width, config.teacher_dim)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.out(self.transformer(vectors.to(next(self.parameters()).dtype)))


class VqConfig(VisualTokenizerConfig):
    """VQGAN (arXiv 2012.09841) with any quantizer."""

    type: str = "vq"
    image_size: int = Field(gt=0)
    encoder: ConvolutionConfig = Field(default_factory=ConvolutionConfig)
    decoder: ConvolutionConfig | None = None
    """Default: as the encoder."""
    z_channels: int = Field(default=256, ge=1)
    quantizer: QuantizerField
    spatial_norm: bool = False
    """Condition every norm of the decoder on the code vectors (MoVQ, arXiv 2209.09002)."""
    semantic_head: SemanticHeadConfig | None = None
    """Also predict a teacher's features from the same codes (the single-codebook counterpart of TokenFlow)."""


class VqTokenizer(VisualTokenizer):
    """One codebook, ``pixel``."""

    name = "vq"
    Config = VqConfig
    config: VqConfig

    def __init__(self, config: VqConfig):
        super().__init__(config)
        self.image = pixel_spec(config.image_size)
        side = config.image_size // config.encoder.factor
        self.grid = (side, side)
        self.quantizer = build_quantizer(config.quantizer)
        self.codebooks = {"pixel": (self.quantizer.size, self.quantizer.num_codes)}
        self.scales = getattr(self.quantizer, "scales", None)
        self.encoder = ConvolutionalEncoder(config.encoder, config.z_channels)
        self.to_codes = nn.Conv2d(config.z_channels, self.quantizer.dim, 1)
        self.from_codes = nn.Conv2d(self.quantizer.dim, config.z_channels, 1)
        condition = self.quantizer.dim if config.spatial_norm else None
        self.decoder = ConvolutionalDecoder(
            config.decoder or config.encoder, config.z_channels, condition_channels=condition
        )
        head = config.semantic_head
        self.semantic_head = None if head is None else SemanticHead(head, self.quantizer.dim, self.grid)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        convolution = {"channels": 16, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8}
        quantizer = {"type": "vq", "size": 32, "parts": {"pixel": 8}}
        return {"type": "vq", "image_size": 16, "encoder": convolution, "z_channels": 16, "quantizer": quantizer}

    @property
    def embed_dims(self) -> dict[str, int]:
        return {"pixel": self.quantizer.dim}

    def _codes(self, ids: Tensor) -> VisualCodes:
        return VisualCodes({"pixel": ids}, self.grid, self.scales)

    def _quantize(self, pixels: Tensor):
        pixels = self.check_pixels(pixels)
        return self.quantizer(to_tokens(self.to_codes(self.encoder(pixels))))

    def _pixels(self, vectors: Tensor) -> Tensor:
        codes = to_map(vectors.to(self.dtype), self.grid)
        return self.decoder(self.from_codes(codes), codes if self.config.spatial_norm else None)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> VisualCodes:
        return self._codes(self._quantize(pixels).codes)

    def quantized(self, pixels: Tensor) -> tuple[VisualCodes, dict[str, Tensor]]:
        out = self._quantize(pixels)
        return self._codes(out.codes), {"pixel": out.quantized}

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        self.check_codes(codes)
        return {"pixel": self.quantizer.embed(codes.codes["pixel"])}

    def code_vectors(self, name: str, codes: Tensor) -> Tensor:
        return self.quantizer.code_vectors(codes)

    def decode(self, codes: VisualCodes) -> Tensor:
        return self._pixels(self.embed(codes)["pixel"])

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        out = self._quantize(pixels)
        features = {} if self.semantic_head is None else {"tokens": self.semantic_head(out.quantized)}
        return TokenizerOutput(
            self._pixels(out.quantized),
            self._codes(out.codes),
            sum_losses({"pixel": out.losses}),
            features,
            tag_usage("pixel", out.usage),
        )

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]
