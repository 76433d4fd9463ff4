"""How are further vectors of the visual tokens added behind the language model's first layers (DeepStack)?"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import ConfigError

_KEY = "visual_levels"


@dataclass
class VisualLevels:
    """What one forward pass adds. It travels with the pass's own arguments, so that layers which are computed again in the
    backward pass add the same, whatever other passes ran between.

    mask: ``(B, T)``, true at visual tokens; vectors: one ``(ΣM, L)`` for each layer from the first on; added: the layers behind
    which it has happened.
    """

    mask: Tensor
    vectors: tuple[Tensor, ...]
    added: set[int] = field(default_factory=set)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the decoder."""
        return {_KEY: self}

    def check(self, decoder: nn.Module) -> None:
        """Raise `ConfigError` where a decoder did not hand the vectors to its layers."""
        if not torch.compiler.is_compiling() and len(self.added) < len(self.vectors):
            raise ConfigError(
                f"connector deepstack: {type(decoder).__name__} does not hand further arguments to its layers, so nothing can be added "
                "behind them; use another language model (llama, qwen2, qwen3 and mistral do) or another connector"
            )


def split_levels(tokens: Any, levels: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Visual tokens as a connector of ``levels`` levels gives them → those of the sequence, and one ``(ΣM, L)`` a level.

    Args:
        tokens: ``(…, (levels + 1) · L)``, or a sequence of such.
        levels: of the connector; 0: nothing is split.
    """
    if not levels:
        return tokens, ()
    joined = tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens))
    first, *others = joined.chunk(levels + 1, dim=-1)
    return first, tuple(part.reshape(-1, part.shape[-1]) for part in others)


def install_levels(decoder: nn.Module, levels: int) -> None:
    """Let a decoder's layers add what a `VisualLevels` among their arguments says. What belongs behind layer k is added before layer
    k + 1, where hidden states are one tensor in every release of transformers.

    Args:
        decoder: a language model without head; its layers get hooks.
        levels: of the connector.

    Raises:
        ConfigError: a decoder without layers of the usual form, or with too few.
    """
    layers: Any = getattr(decoder, "layers", None)
    if layers is None or len(layers) <= levels:
        raise ConfigError(
            f"connector deepstack: {levels} levels need a language model with at least {levels + 1} layers in its list `layers`; "
            f"{type(decoder).__name__} has {'none' if layers is None else len(layers)}"
        )
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(_add, number - 1), with_kwargs=True)


def _add(level: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a layer: add a level's vectors to the hidden states ``(B, T, L)`` at visual tokens."""
    found: VisualLevels | None = kwargs.get(_KEY)
    if found is None:
        return None
    rest = {key: value for key, value in kwargs.items() if key != _KEY}  # attention functions do not know it
    if not 0 <= level < len(found.vectors):
        return args, rest
    by_name = not args
    hidden = rest["hidden_states"] if by_name else args[0]
    vectors = found.vectors[level].to(hidden.device, hidden.dtype)
    hidden = hidden + torch.zeros_like(hidden).masked_scatter(found.mask.to(hidden.device)[..., None], vectors)
    found.added.add(level)
    if by_name:
        return args, {**rest, "hidden_states": hidden}
    return (hidden, *args[1:]), rest
