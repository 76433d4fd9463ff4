"""How is a vector replaced by one entry of a codebook, or of several codebooks that share the index?"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.visual_tokenizers.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    batch_usage,
    check_input,
    straight_through,
)
from mllm.visual_tokenizers.quantizers.codebook import Codebook, CodebookConfig
from mllm.visual_tokenizers.quantizers.search import nearest_codes, squared_distances


class VectorQuantizerConfig(QuantizerConfig):
    """Nearest entry of a codebook. With several parts, one index selects a row in each part's book (TokenFlow)."""

    type: str = "vq"
    size: int = Field(ge=2)
    parts: dict[str, int]
    """Part → channels, in channel order; one part is plain VQ, ``{semantic: 32, pixel: 8}`` is TokenFlow's shared
    mapping."""
    part_order: list[str] = Field(default_factory=list)
    """The order of ``parts``, kept apart because transformers writes JSON with sorted keys; filled in."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Part → weight of its squared distance in the search (default 1; TokenFlow's code uses 1 for both)."""
    l2_norm: bool = False
    """Scale each part of the input, and each part's entries, to length 1."""
    codebook: CodebookConfig = Field(default_factory=CodebookConfig)
    codebooks: dict[str, CodebookConfig] = Field(default_factory=dict)
    """Part → a config of its own (e.g. a moving-average semantic book beside a gradient pixel book)."""
    beta: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss ``mean((z - sg q)²)``."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """Weight of ``mean((q - sg z)²)`` for books that learn by gradient."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of (mean entropy per position - entropy of the mean); builds all distances of the batch when above 0."""
    entropy_temperature: float = Field(default=0.01, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _ordered(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("parts"), dict):
            return data
        parts, order = data["parts"], data.get("part_order") or list(data["parts"])
        if set(order) != set(parts):
            raise ValueError(f"part_order {order} does not name the parts {list(parts)}; leave it out")
        return {**data, "parts": {name: parts[name] for name in order}, "part_order": list(order)}

    @model_validator(mode="after")
    def _parts(self) -> VectorQuantizerConfig:
        if not self.parts or any(channels < 1 for channels in self.parts.values()):
            raise ValueError("parts names at least one part with its number of channels, e.g. {pixel: 8}")
        for key in (*self.weights, *self.codebooks):
            if key not in self.parts:
                raise ValueError(f"weights or codebooks name {key!r}, which is not a part ({', '.join(self.parts)})")
        return self


class VectorQuantizer(Quantizer):
    """One code per position: the entry with the smallest summed squared distance over the parts."""

    name = "vq"
    Config = VectorQuantizerConfig
    config: VectorQuantizerConfig
    num_codes = 1

    def __init__(self, config: VectorQuantizerConfig):
        super().__init__(config)
        self.size, self.dim = config.size, sum(config.parts.values())
        self.books = nn.ModuleDict(
            {
                part: Codebook(config.codebooks.get(part, config.codebook), config.size, c)
                for part, c in config.parts.items()
            }
        )
        self.weights = [config.weights.get(part, 1.0) for part in config.parts]

    def split(self, z: Tensor) -> list[Tensor]:
        """``(..., D)`` → one tensor per part, in order."""
        return list(z.split(list(self.config.parts.values()), dim=-1))

    def book(self, part: str) -> Codebook:
        """The codebook of one part."""
        return self.books[part]  # type: ignore[return-value]

    def _all_books(self) -> list[Codebook]:
        return [self.book(part) for part in self.config.parts]

    def _normalise(self, parts: list[Tensor]) -> list[Tensor]:
        return [F.normalize(part, dim=-1) for part in parts] if self.config.l2_norm else parts

    def tables(self) -> list[Tensor]:
        """The parts' entries ``(K, D_part)`` as the search and the output use them."""
        return self._normalise([book.table() for book in self._all_books()])

    def table(self) -> Tensor:
        """All entries ``(K, D)``, parts side by side."""
        return torch.cat(self.tables(), dim=-1)

    def _scaled(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([weight**0.5 * part for weight, part in zip(self.weights, parts)], -1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        table, search_table = self.search_tables()
        inputs, search_z, ids = self._search(check_input(z, self.dim), search_table)
        z = torch.cat(inputs, -1)
        quantized = F.embedding(ids, table).view_as(z)
        losses = self._losses(z, quantized, search_z, search_table)
        if self.training and torch.is_grad_enabled():
            for book, part in zip(self._all_books(), inputs):
                book.observe(part.detach().flatten(0, 1), ids)
        codes = ids.view(*z.shape[:2], 1)
        return QuantizerOutput(straight_through(z, quantized), codes, losses, batch_usage(codes, self.size))

    def search_tables(self) -> tuple[Tensor, Tensor]:
        """All entries ``(K, D)``, as they come out and as they are searched: for `nearest`, made once for many calls."""
        tables = self.tables()
        return torch.cat(tables, -1), self._scaled(tables)

    def _search(self, z: Tensor, search_table: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Vectors ``(B, N, D)``, fp32 → their parts as compared, the rows that are searched for ``(B·N, D)``, and codes ``(B·N,)``."""
        inputs = self._normalise(self.split(z))
        search_z = self._scaled(inputs).flatten(0, 1)
        return inputs, search_z, nearest_codes(search_z, search_table)

    def nearest(self, z: Tensor, tables: tuple[Tensor, Tensor]) -> QuantizerOutput:
        """What `forward` gives for vectors ``(B, N, D)``, fp32, without losses and usages, and without learning from them. tables:
        `search_tables`."""
        inputs, _, ids = self._search(z, tables[1])
        z = torch.cat(inputs, -1)
        quantized = straight_through(z, F.embedding(ids, tables[0]).view_as(z))
        return QuantizerOutput(quantized, ids.view(*z.shape[:2], 1))

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        return self.nearest(check_input(z, self.dim), self.search_tables()).codes

    def _losses(self, z: Tensor, quantized: Tensor, search_z: Tensor, search_table: Tensor) -> dict[str, Tensor]:
        config = self.config
        losses = {"commitment": config.beta * _mean_square(z - quantized.detach())}
        if any(book.config.learn != "ema" for book in self._all_books()):
            losses["codebook"] = config.codebook_weight * _mean_square(quantized - z.detach())
        if config.entropy_weight > 0 and z.numel():
            affinity = -squared_distances(search_z, search_table)
            losses["entropy"] = config.entropy_weight * entropy_loss(affinity, config.entropy_temperature)
        return losses

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return F.embedding(codes[..., 0], self.table())

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.embed(codes).unsqueeze(2)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean() if difference.numel() else difference.sum()


def entropy_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each row's softmax minus the entropy of the mean distribution (MaskGIT, arXiv 2202.04200; as
    TokenFlow uses it). affinity ``(M, K)``, usually minus the squared distances."""
    logits = affinity / temperature
    log_p = F.log_softmax(logits + 1e-5, dim=-1)
    p = logits.softmax(-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
