"""Which heads turn a language model's hidden state into visual codes?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import StrictModel
from mllm.errors import ConfigError
from mllm.visual_tokenizers.sampling import guide, sample

__all__ = ["DepthTransformer", "DepthTransformerConfig", "GenerationHead"]


class GenerationHead(nn.Module):
    """Linear, GELU, linear to the codebook's size (Janus, arXiv 2410.13848): ``(B, N, L)`` → ``(B, N, size)``."""

    def __init__(self, width: int, inner: int, size: int):
        super().__init__()
        self.inner = nn.Linear(width, inner)
        self.out = nn.Linear(inner, size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(F.gelu(self.inner(hidden)))


class DepthTransformerConfig(StrictModel):
    """Sizes of a depth transformer."""

    width: int = Field(ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class _DepthBlock(nn.Module):
    """Pre-norm causal block: separate query, key and value with bias, GELU MLP of 4 × width."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(h))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class DepthTransformer(nn.Module):
    """Predicts the Q codes of one position one after the other (RQ-Transformer, arXiv 2203.01941; VILA-U, arXiv
    2409.04429).

    Every position is a sequence of its own, of length Q: first the language model's hidden state, then the running
    sums of the codes' vectors. One such head per codebook makes DualToken's output side.
    """

    def __init__(self, config: DepthTransformerConfig, *, hidden: int, code_dim: int, size: int, depth: int):
        """hidden: L; code_dim: channels of a code's vector; size: codes in the book; depth: Q."""
        super().__init__()
        if config.width % config.heads:
            raise ConfigError(f"depth transformer: width {config.width} is not a multiple of {config.heads} heads")
        self.config, self.size, self.depth = config, size, depth
        self.from_hidden = nn.Linear(hidden, config.width)
        self.from_codes = nn.Linear(code_dim, config.width)
        self.positions = nn.Parameter(torch.randn(1, depth, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            _DepthBlock(config.width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, size)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """hidden ``(B, N, L)``: the states before each visual position; vectors ``(B, N, Q, D)``: the true codes'
        vectors (`VisualTokenizer.code_vectors`) → logits ``(B, N, Q, size)``. Fewer vectors than Q - 1 predict as
        far as they go."""
        batch, number = hidden.shape[:2]
        rows = batch * number
        first = self.from_hidden(hidden).reshape(rows, 1, self.config.width)
        running = vectors[:, :, : self.depth - 1].cumsum(2).reshape(rows, -1, vectors.shape[-1]) if rows else None
        x = first if running is None else torch.cat([first, self.from_codes(running.to(first.dtype))], 1)
        x = x + self.positions[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).view(batch, number, x.shape[1], self.size)

    @torch.no_grad()
    def generate(
        self,
        hidden: Tensor,
        vectors_of: Callable[[Tensor], Tensor],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Codes ``(B, Q)`` of one position. vectors_of: ids ``(B, 1, q)`` of the first depths → ``(B, 1, q, D)``.

        hidden ``(B, L)``; with guidance other than 1 it is ``(2B, L)``: conditional half, then unconditional half;
        both halves are continued with the same drawn codes. uniform ``(B, Q)``: see `sample`.
        """
        guided = guidance != 1.0
        number = len(hidden) // 2 if guided else len(hidden)
        codes = torch.empty(number, 0, dtype=torch.int64, device=hidden.device)
        for _ in range(self.depth):
            known = codes[:, None]
            vectors = (
                vectors_of(known) if codes.shape[1] else hidden.new_zeros(number, 1, 0, self.from_codes.in_features)
            )
            vectors = vectors.to(hidden.dtype)
            if guided:
                vectors = torch.cat([vectors, vectors])
            logits = self(hidden[:, None], vectors)[:, 0, -1]
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = guide(conditional, unconditional, guidance)
            draw = None if uniform is None else uniform[:, codes.shape[1]]
            drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, uniform=draw)
            codes = torch.cat([codes, drawn[:, None]], 1)
        return codes
