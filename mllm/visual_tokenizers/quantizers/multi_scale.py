"""How is a feature map written as codes of growing resolution?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.visual_tokenizers.quantizers.base import Quantizer, QuantizerConfig, QuantizerOutput, batch_usage, check_input
from mllm.visual_tokenizers.quantizers.search import exact_matmul
from mllm.visual_tokenizers.quantizers.vector import VectorQuantizer, VectorQuantizerConfig


class MultiScaleQuantizerConfig(QuantizerConfig):
    """Residual quantisation over scales (VAR, arXiv 2404.02905; TokenFlow, arXiv 2412.03069)."""

    type: str = "multi_scale"
    scales: tuple[int, ...] = Field(min_length=1)
    """Side lengths, growing; the last one is the feature map's own."""
    inner: VectorQuantizerConfig
    """The quantizer that every scale uses."""
    drop: float = Field(default=0.0, ge=0, le=1)
    """Training: probability of leaving out one random scale (never the first); TokenFlow uses 0.1."""

    @field_validator("scales")
    @classmethod
    def _growing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[0] < 1 or any(b <= a for a, b in pairwise(value)):
            raise ValueError("scales must be positive and grow, e.g. [1, 2, 4]")
        return value


class MultiScaleQuantizer(Quantizer):
    """One code per cell of every scale: ``sum(s²)`` codes for a map of side ``scales[-1]``."""

    name = "multi_scale"
    Config = MultiScaleQuantizerConfig
    config: MultiScaleQuantizerConfig
    num_codes = 1

    def __init__(self, config: MultiScaleQuantizerConfig):
        super().__init__(config)
        self.inner = VectorQuantizer(config.inner)
        self.size, self.dim = self.inner.size, self.inner.dim
        self.scales: tuple[int, ...] = tuple(config.scales)
        self.side = self.scales[-1]
        self.num_positions = sum(s * s for s in self.scales)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> QuantizerOutput:
        z = check_input(z, self.dim)
        total = torch.zeros_like(self._map(z, self.side))
        losses: dict[str, Tensor] = {}
        codes = []
        for output, step in self._walk(z, self.inner, self._dropped()):
            total = total + step
            codes.append(output.codes)
            for key, value in output.losses.items():
                losses[key] = losses.get(key, value.new_zeros(())) + value
        number = len(codes)
        joined = torch.cat(codes, 1)
        return QuantizerOutput(
            total.flatten(2).transpose(1, 2),
            joined,
            {key: value / number for key, value in losses.items()},
            batch_usage(joined, self.size),
        )

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        tables = self.inner.search_tables()  # once for all scales: nothing learns here
        walk = self._walk(check_input(z, self.dim), lambda tokens: self.inner.nearest(tokens, tables))
        return torch.cat([output.codes for output, _ in walk], 1)

    def _walk(
        self, z: Tensor, quantize: Callable[[Tensor], QuantizerOutput], dropped: int | None = None
    ) -> Iterator[tuple[QuantizerOutput, Tensor]]:
        """Scale by scale: what ``quantize`` makes of the rest, and that at the map's own size ``(B, D, side, side)``."""
        residual = self._map(z, self.side)
        for index, scale in enumerate(self.scales):
            if index == dropped:
                continue
            small = F.interpolate(residual, size=(scale, scale), mode="area")
            output = quantize(small.flatten(2).transpose(1, 2))
            step = self._upsample(self._map(output.quantized, scale))
            residual = residual - step.detach()
            yield output, step

    def _dropped(self) -> int | None:
        """Position of the scale to leave out this time. A counted draw, so that all ranks leave out the same one."""
        if self.config.drop == 0 or len(self.scales) == 1 or not (self.training and torch.is_grad_enabled()):
            return None
        draw = random.Random(int(self.steps))
        self.steps += 1
        return draw.randrange(1, len(self.scales)) if draw.random() < self.config.drop else None

    def _map(self, tokens: Tensor, side: int) -> Tensor:
        """``(B, side², D)`` → ``(B, D, side, side)``."""
        if tokens.shape[1] != side * side:
            raise ConfigError(f"{tokens.shape[1]} positions are not a {side}×{side} map")
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def _upsample(self, small: Tensor) -> Tensor:
        return enlarge(small, self.side)

    def split_scales(self, codes: Tensor) -> list[Tensor]:
        """Codes ``(B, sum(s²), 1)``, or their vectors, → one ``(B, s², 1)`` per scale. Raises `ConfigError` for another length."""
        if codes.shape[1] != self.num_positions:
            raise ConfigError(f"scales {self.scales} have {self.num_positions} codes, got {codes.shape[1]}")
        return list(codes.split([s * s for s in self.scales], dim=1))

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.inner.code_vectors(codes)

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        vectors = F.embedding(codes[..., 0], self.inner.table())
        parts = zip(self.scales, self.split_scales(vectors))
        total = sum(self._upsample(self._map(part, scale)) for scale, part in parts)
        assert isinstance(total, Tensor)
        return total.flatten(2).transpose(1, 2)


def enlarge(small: Tensor, side: int) -> Tensor:
    """``(B, C, s, s)`` → ``(B, C, side, side)``, bicubic.

    On a CUDA GPU by one product with the interpolation's weights: torch's own kernel gives a thread to each of the ``side²`` places, which
    then goes over all images and channels.
    """
    if small.device.type != "cuda":
        return F.interpolate(small, size=(side, side), mode="bicubic")
    with exact_matmul(small.device):
        large = small.flatten(2) @ bicubic_weights(small.shape[-1], side, small.device).to(small.dtype)
    return large.unflatten(2, (side, side))


@lru_cache(maxsize=64)
def bicubic_weights(small: int, side: int, device: torch.device) -> Tensor:
    """What each place of a ``small × small`` map gives to each of a ``side × side`` one: ``(small², side²)``, fp32."""
    with torch.inference_mode(False), torch.no_grad():
        places = torch.eye(small * small).view(1, small * small, small, small)
        return F.interpolate(places, size=(side, side), mode="bicubic")[0].flatten(1).to(device)
