"""How does a map that conditions a denoiser learn what a text says, before it is added (DualDiff, arXiv 2505.01857, 2503.03689)?

Written from a description of yangzhaojason/DualDiff, which states no licence, and checked by its numbers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError


class SemanticFusion(nn.Module):
    """A map plus what its positions read of a text: ``(B, C, H, W)`` and ``(B, T, D)`` give ``(B, C, H, W)``.

    twice: what they read first asks the map itself, and that answer is added (the "plus" form). Nothing is normed and nothing starts at
    zero; the result is meant to be added behind a network's first convolution.
    """

    def __init__(self, width: int, text_width: int, *, heads: int = 8, twice: bool = False):
        super().__init__()
        if width % heads:
            raise ConfigError(f"semantic fusion: width {width} is no multiple of its {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(text_width, width, bias=False) for _ in range(2))
        self.own_key, self.own_value = (nn.Linear(width, width, bias=False) if twice else None for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, maps: Tensor, text: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        read = F.scaled_dot_product_attention(
            self._split(self.query(tokens)), self._split(self.key(text)), self._split(self.value(text))
        )
        if self.own_key is not None and self.own_value is not None:
            read = F.scaled_dot_product_attention(
                read, self._split(self.own_key(tokens)), self._split(self.own_value(tokens))
            )
        joined = self.out(read.transpose(1, 2).flatten(2))
        return maps + joined.transpose(1, 2).unflatten(2, maps.shape[-2:])

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def weighted_error(told: Tensor, target: Tensor, heat: Tensor | None = None) -> Tensor:
    """Squared errors ``(…, C, H, W)``, those where something matters again by its heat ``(…, H, W)`` (DualDiff's foreground loss); their
    mean over everything is the loss."""
    error = (told.float() - target.float()).square()
    return error if heat is None else error * (1 + heat.unsqueeze(-3).to(error))
