"""How does TokenFlow write an image: one index that selects a semantic and a pixel code together?"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
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
from mllm.visual_tokenizers.encoder import FeatureEncoder, encoder_settings
from mllm.visual_tokenizers.networks.convolution import ConvolutionalDecoder, ConvolutionalEncoder, ConvolutionConfig
from mllm.visual_tokenizers.networks.transformer import tanh_bottleneck
from mllm.visual_tokenizers.quantizers import QuantizerField, QuantizerOutput, build_quantizer
from mllm.visual_tokenizers.quantizers.multi_scale import MultiScaleQuantizer, MultiScaleQuantizerConfig
from mllm.visual_tokenizers.quantizers.vector import VectorQuantizer, VectorQuantizerConfig
from mllm.visual_tokenizers.vq import SemanticHead, SemanticHeadConfig

EncoderSettings = Annotated[dict[str, Any], BeforeValidator(encoder_settings)]


class TokenFlowConfig(VisualTokenizerConfig):
    """TokenFlow (arXiv 2412.03069)."""

    type: str = "tokenflow"
    image_size: int = Field(gt=0)
    student: EncoderSettings
    """The semantic branch, which learns: ``{type: small_vit, …}`` or any encoder's config; its layer is its own
    setting."""
    student_normalise: bool = True
    """False: the student sees [-1, 1] whatever its own mean and std (the published CLIP variant)."""
    pixel_image_size: int | None = Field(default=None, gt=0)
    """Side that the pixel branch works at when it is not ``image_size`` (432 for the 384 variant), resized bicubic."""
    encoder: ConvolutionConfig = Field(default_factory=ConvolutionConfig)
    decoder: ConvolutionConfig | None = None
    """Default: as the encoder. The published "enhanced" one has 256 channels and 4 residual blocks."""
    z_channels: int = Field(default=256, ge=1)
    quantizer: QuantizerField
    """``multi_scale`` (or plain ``vq``) with the parts ``semantic`` and ``pixel``."""
    semantic_head: SemanticHeadConfig

    @model_validator(mode="after")
    def _parts(self) -> TokenFlowConfig:
        inner = self.quantizer.inner if isinstance(self.quantizer, MultiScaleQuantizerConfig) else self.quantizer
        if not isinstance(inner, VectorQuantizerConfig) or set(inner.parts) != {"semantic", "pixel"}:
            raise ValueError(
                "quantizer must be vq or multi_scale with the parts semantic and pixel, each with its channels"
            )
        return self


class TokenFlow(VisualTokenizer):
    """One codebook name, ``shared``: its index stands for a semantic and a pixel vector."""

    name = "tokenflow"
    Config = TokenFlowConfig
    config: TokenFlowConfig

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        self.image = pixel_spec(config.image_size)
        self.pixel_size = config.pixel_image_size or config.image_size
        side = self.pixel_size // config.encoder.factor
        self.grid = (side, side)
        self.quantizer = build_quantizer(config.quantizer)
        self.scales = self.quantizer.scales if isinstance(self.quantizer, MultiScaleQuantizer) else None
        if self.scales is not None and self.scales[-1] != side:
            raise ConfigError(
                f"tokenflow: the last scale is {self.scales[-1]} but the pixel branch makes a {side}×{side} map"
            )
        inner = self.quantizer.inner if isinstance(self.quantizer, MultiScaleQuantizer) else self.quantizer
        assert isinstance(inner, VectorQuantizer)
        self.part_dims = dict(inner.config.parts)
        self.codebooks = {"shared": (self.quantizer.size, 1)}
        self.student = FeatureEncoder(config.student, normalise=config.student_normalise)
        if tuple(self.student.grid) != self.grid:
            raise ConfigError(
                f"tokenflow: the student's grid is {self.student.grid}, the pixel branch's {self.grid}; they must agree"
            )
        self.to_semantic = tanh_bottleneck(self.student.width, self.part_dims["semantic"])
        self.encoder = ConvolutionalEncoder(config.encoder, config.z_channels)
        self.to_pixel = nn.Conv2d(config.z_channels, self.part_dims["pixel"], 1)
        self.semantic_head = SemanticHead(config.semantic_head, self.part_dims["semantic"], self.grid)
        self.from_pixel = nn.Conv2d(self.part_dims["pixel"], config.z_channels, 1)
        self.decoder = ConvolutionalDecoder(config.decoder or config.encoder, config.z_channels)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        shared = {"type": "vq", "size": 32, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True}
        return {
            "type": "tokenflow",
            "image_size": 16,
            "student": {"type": "small_vit", "image_size": 16, "patch_size": 4, "width": 24, "depth": 1, "heads": 2},
            "encoder": {"channels": 16, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8},
            "z_channels": 16,
            "quantizer": {"type": "multi_scale", "scales": [1, 2, 4], "inner": shared},
            "semantic_head": {"teacher_dim": 24, "width": 24, "depth": 1, "heads": 2},
        }

    @property
    def embed_dims(self) -> dict[str, int]:
        return {"shared": self.quantizer.dim}

    def load_pretrained(self) -> None:
        self.student.load_pretrained()

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """``(B, N, D)`` → its ``semantic`` and ``pixel`` channels."""
        return dict(zip(self.part_dims, vectors.split(list(self.part_dims.values()), dim=-1)))

    def _vectors(self, pixels: Tensor) -> Tensor:
        pixels = self.check_pixels(pixels)
        semantic = self.to_semantic(self.student(pixels))
        z = self.to_pixel(self.encoder(self._resized(pixels, self.pixel_size)))
        parts = {"semantic": semantic, "pixel": to_tokens(z)}
        return torch.cat([parts[name] for name in self.part_dims], -1)

    def _quantize(self, pixels: Tensor) -> QuantizerOutput:
        return self.quantizer(self._vectors(pixels))

    @staticmethod
    def _resized(pixels: Tensor, size: int) -> Tensor:
        return pixels if pixels.shape[-1] == size else F.interpolate(pixels, size=(size, size), mode="bicubic")

    def _pixels(self, vectors: Tensor) -> Tensor:
        z = self.from_pixel(to_map(self.split(vectors)["pixel"].to(self.dtype), self.grid))
        return self._resized(self.decoder(z), self.image.height)

    def _codes(self, ids: Tensor) -> VisualCodes:
        return VisualCodes({"shared": ids}, self.grid, self.scales)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> VisualCodes:
        return self._codes(self.quantizer.encode(self._vectors(pixels)))

    def quantized(self, pixels: Tensor) -> tuple[VisualCodes, dict[str, Tensor]]:
        out = self._quantize(pixels)
        return self._codes(out.codes), {"shared": out.quantized}

    @property
    def feature_dims(self) -> dict[str, int]:
        return dict(self.part_dims)

    def feature_parts(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.split(vectors["shared"])

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        self.check_codes(codes)
        return {"shared": self.quantizer.embed(codes.codes["shared"])}

    def code_vectors(self, name: str, codes: Tensor) -> Tensor:
        return self.quantizer.code_vectors(codes)

    def semantic_tokens(self, codes: VisualCodes) -> Tensor:
        """codes → the teacher's features as the semantic decoder sees them ``(B, N, teacher_dim)``."""
        return self.semantic_head(self.split(self.embed(codes)["shared"])["semantic"])

    def decode(self, codes: VisualCodes) -> Tensor:
        return self._pixels(self.embed(codes)["shared"])

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        out = self._quantize(pixels)
        return TokenizerOutput(
            self._pixels(out.quantized),
            self._codes(out.codes),
            sum_losses({"shared": out.losses}),
            {"tokens": self.semantic_head(self.split(out.quantized)["semantic"])},
            tag_usage("shared", out.usage),
        )

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]
