"""How is a vector cut into chunks that each get a code of their own?"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.visual_tokenizers.quantizers.base import Quantizer, QuantizerConfig, QuantizerOutput, batch_usage, check_input
from mllm.visual_tokenizers.quantizers.codebook import CodebookConfig
from mllm.visual_tokenizers.quantizers.vector import VectorQuantizer, VectorQuantizerConfig


class ProductQuantizerConfig(QuantizerConfig):
    """Several sub-codebooks per token (UniTok, arXiv 2502.20321: 8 chunks × 4096 entries)."""

    type: str = "product"
    size: int = Field(ge=2)
    """Entries of each sub-codebook."""
    dim: int = Field(ge=1)
    chunks: int = Field(ge=1)
    l2_norm: bool = False
    codebook: CodebookConfig = Field(default_factory=CodebookConfig)
    beta: float = Field(default=0.25, ge=0)
    codebook_weight: float = Field(default=1.0, ge=0)
    entropy_weight: float = Field(default=0.0, ge=0)
    entropy_temperature: float = Field(default=0.01, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> ProductQuantizerConfig:
        if self.dim % self.chunks:
            raise ValueError(f"dim {self.dim} is not a multiple of chunks {self.chunks}")
        return self


class ProductQuantizer(Quantizer):
    """Q codes per position, each for D/Q channels, each with its own book."""

    name = "product"
    Config = ProductQuantizerConfig
    config: ProductQuantizerConfig

    def __init__(self, config: ProductQuantizerConfig):
        super().__init__(config)
        self.size, self.dim, self.num_codes = config.size, config.dim, config.chunks
        inner = config.model_dump(exclude={"type", "dim", "chunks"})
        part = {"chunk": config.dim // config.chunks}
        self.chunks = nn.ModuleList(
            VectorQuantizer(VectorQuantizerConfig(parts=part, **inner)) for _ in range(config.chunks)
        )

    def forward(self, z: Tensor) -> QuantizerOutput:
        z = check_input(z, self.dim)
        outputs = [chunk(part) for chunk, part in zip(self.chunks, z.chunk(self.num_codes, dim=-1))]
        codes = torch.cat([output.codes for output in outputs], -1)
        losses = {key: torch.stack([output.losses[key] for output in outputs]).mean() for key in outputs[0].losses}
        quantized = torch.cat([output.quantized for output in outputs], -1)
        return QuantizerOutput(quantized, codes, losses, batch_usage(codes, self.size))

    def code_vectors(self, codes: Tensor) -> Tensor:
        self.check_codes(codes, partial=True)
        pairs = zip(codes.split(1, dim=-1), self.chunks)
        vectors = [chunk.code_vectors(part) for part, chunk in pairs]  # type: ignore[operator]
        return torch.cat(vectors, dim=2)

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return self.code_vectors(codes).flatten(2)
