"""What happens to visual tokens inside the language model: vectors added behind layers (DeepStack), windows read again (Cambrian)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.types import ViewLayout

_KEY = "visual_levels"


@dataclass
class Visits:
    """What one forward pass does behind layers of the decoder. It travels with the pass's own arguments, so that layers which are
    computed again in the backward pass do the same, whatever other passes ran between.

    mask: ``(B, T)``, true at visual tokens; done: the layers behind which it has happened.
    """

    connector: ClassVar[str]
    mask: Tensor
    done: set[int] = field(default_factory=set, init=False)

    def layers(self) -> set[int]:
        """Behind which something happens."""
        raise NotImplementedError

    def apply(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states ``(B, T, L)`` behind a layer as the next one is to find them."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the decoder."""
        return {_KEY: self}

    def check(self, decoder: nn.Module) -> None:
        """Raise `ConfigError` where a decoder did not hand this to its layers."""
        if not torch.compiler.is_compiling() and len(self.done) < len(self.layers()):
            raise ConfigError(
                f"connector {self.connector}: {type(decoder).__name__} does not hand further arguments to its layers, so nothing can be "
                "added behind them; use another language model (llama, qwen2, qwen3 and mistral do) or another connector"
            )


@dataclass
class VisualLevels(Visits):
    """vectors: one ``(ΣM, L)`` for each layer from the first on, added to the visual tokens behind it."""

    connector = "deepstack"
    vectors: tuple[Tensor, ...]

    def layers(self) -> set[int]:
        return set(range(len(self.vectors)))

    def apply(self, layer: int, hidden: Tensor) -> Tensor:
        vectors = self.vectors[layer].to(hidden.device, hidden.dtype)
        return hidden + torch.zeros_like(hidden).masked_scatter(self.mask.to(hidden.device)[..., None], vectors)


@dataclass
class VisualReads(Visits):
    """beside ``(ΣM, X)``: what each visual token reads; readers: layer → the module behind it (`Connector.readers`)."""

    connector = "spatial_aggregator: inside"
    beside: Tensor
    readers: Mapping[int, nn.Module]

    def layers(self) -> set[int]:
        return set(self.readers)

    def apply(self, layer: int, hidden: Tensor) -> Tensor:
        mask = self.mask.to(hidden.device)[..., None]
        seen = hidden.masked_select(mask).view(-1, hidden.shape[-1]).to(self.beside)
        if not len(seen):  # a batch of text alone in training: ranks run the same parts, and reduce the same gradients
            one = self.readers[layer](self.beside.new_zeros(1, hidden.shape[-1]), self.beside[:1].detach())
            return hidden + 0.0 * one.sum().to(hidden)
        return hidden.masked_scatter(mask, self.readers[layer](seen, self.beside).to(hidden))


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


def split_beside(tokens: Any, beside: int) -> tuple[Any, Tensor]:
    """Visual tokens as a connector with readers gives them → those of the sequence ``(…, L)``, and what lies beside them ``(ΣM, X)``.

    Args:
        tokens: ``(…, L + X)``, or a sequence of such.
        beside: X.
    """
    joined = tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens))
    first, rest = joined.split([joined.shape[-1] - beside, beside], dim=-1)
    return first, rest.reshape(-1, beside)


def visits_of(
    view: ViewLayout, readers: Mapping[int, nn.Module], tokens: Any, places: Callable[[], Tensor]
) -> tuple[Any, Visits | None]:
    """Visual tokens as a connector gives them → those of the sequence, and what happens to them inside the language model.

    Args:
        view: what the connector makes of a view.
        readers: of the connector.
        tokens: ``(…, L and more)``, or a sequence of such.
        places: gives ``(B, T)``, true at visual tokens.
    """
    if view.beside:
        first, beside = split_beside(tokens, view.beside)
        return first, VisualReads(places(), beside, readers)
    first, vectors = split_levels(tokens, view.levels)
    return first, VisualLevels(places(), vectors) if vectors else None


def install_visits(decoder: nn.Module, levels: int, readers: Mapping[int, nn.Module]) -> None:
    """`install_levels` for a connector of ``levels`` levels, or with ``readers`` (`Connector.readers`); nothing for one without either.

    Args:
        decoder: a language model without head; its layers get hooks.
        levels: of the connector.
        readers: of the connector.

    Raises:
        ConfigError: a decoder without layers of the usual form, or with too few.
    """
    if readers:
        layers, last = getattr(decoder, "layers", None), max(readers)
        if layers is None or len(layers) <= last + 1:
            raise ConfigError(
                f"connector spatial_aggregator: inside: its last sampler is behind layer {last}, so the language model needs at least "
                f"{last + 2} layers in its list `layers`; {type(decoder).__name__} has {'none' if layers is None else len(layers)}; "
                "lower inside.count or inside.stride"
            )
    if levels or readers:
        install_levels(decoder, levels)


def install_levels(decoder: nn.Module, levels: int) -> None:
    """Let a decoder's layers do what `Visits` among their arguments say. What belongs behind layer k is done before layer k + 1, where
    hidden states are one tensor in every release of transformers.

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
        layer.register_forward_pre_hook(partial(_visit, number - 1), with_kwargs=True)


def _visit(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a layer: what happens behind the one before it, ``layer``."""
    found: Visits | None = kwargs.get(_KEY)
    if found is None:
        return None
    rest = {key: value for key, value in kwargs.items() if key != _KEY}  # attention functions do not know it
    if layer not in found.layers():
        return args, rest
    by_name = not args
    hidden = found.apply(layer, rest["hidden_states"] if by_name else args[0])
    found.done.add(layer)
    if by_name:
        return args, {**rest, "hidden_states": hidden}
    return (hidden, *args[1:]), rest
