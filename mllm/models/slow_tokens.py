"""How do some of the language model's layers read tokens that do not stand in the sequence (Slow-Fast)?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm.connectors.slow_fast import SlowTokenAttention
from mllm.errors import AlignmentError, ConfigError
from mllm.types import FastFrames, VisualLayout

_KEY = "slow_tokens"
ATTENTION = "mllm_slow_fast"
"""Name of our attention among transformers' own."""
_ORIGINAL = "config_without_slow_tokens"


@dataclass
class SlowTokens:
    """What one forward pass reads beside its sequence. It travels with the pass's own arguments, so that layers which are computed again
    in the backward pass read the same.

    tokens: ``(B, S, L)``; of: ``(B, S)``, the number of the packed sample that each belongs to, -1 for padding; valid: ``(B, S)`` or
    ``(B, T, S)``, what each position may read; asks: ``(B, T)``, positions that are text; kept: layer → keys and values, while a
    text is written; read: layers that did.
    """

    tokens: Tensor
    of: Tensor
    valid: Tensor
    asks: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    read: set[int] = field(default_factory=set)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the decoder."""
        return {_KEY: self}

    def check(self, decoder: nn.Module) -> None:
        """Raise `ConfigError` where a decoder did not hand them to its layers' attention."""
        if not torch.compiler.is_compiling() and not self.read:
            raise ConfigError(
                f"connector slow_fast: {type(decoder).__name__} does not hand further arguments to its attention, so that nothing is read "
                "there; use another language model (llama, qwen2, qwen3 and mistral do) or another connector"
            )

    def remember(self, cache: Any) -> None:
        """Let the tokens be read on by what is written after this pass. cache: the language model's own."""
        kept = self.kept if self.kept is not None else {}
        setattr(cache, _KEY, SlowTokens(self.tokens.detach(), self.of, self.of >= 0, self.asks[:, :0], kept))

    def together_with(self, later: SlowTokens) -> SlowTokens:
        """Those of earlier passes and of this one, for this pass's positions."""
        before = self.valid[:, None, :].expand(-1, later.asks.shape[1], -1)
        tokens = torch.cat([self.tokens.to(later.tokens), later.tokens], dim=1)
        valid = torch.cat([before, later.valid], dim=-1)
        return SlowTokens(tokens, torch.cat([self.of, later.of], dim=1), valid, later.asks)


def take_slow(
    picture: VisualLayout,
    learns: bool,
    embeddings: Tensor,
    cache: Any,
    tokens: Any,
    layouts: Sequence[VisualLayout] | None,
    places: Tensor,
    position_ids: Tensor | None,
) -> tuple[Any, SlowTokens | None]:
    """Visual tokens that stand in the sequence, and what its layers read beside it: of this pass and of those before it.

    Args:
        picture: how a picture lies.
        learns: whether the model is in training.
        embeddings: ``(B, T, L)``.
        cache: of earlier passes, or None.
        tokens: as the connector gives them; None or empty without visuals.
        layouts: of the visuals; None: pictures alone.
        places: ``(B, T)`` bool, where visual tokens stand.
        position_ids: ``(B, T)``.

    Returns:
        Tokens ``(ΣM, L)``, and what is read (None: nothing).
    """
    before = from_cache(cache, (embeddings.shape[0], embeddings.shape[1]), embeddings.device)
    if tokens is None or not len(tokens):
        idle = before is None and learns and torch.is_grad_enabled()
        return tokens, idle_slow(embeddings) if idle else before
    fast, slow, layouts = split_slow(tokens, layouts, picture)
    laid = lay_slow(slow, layouts, places, position_ids)
    return fast, laid if before is None else before.together_with(laid)


def from_cache(cache: Any, shape: tuple[int, int], device: torch.device) -> SlowTokens | None:
    """What earlier passes of the same text read. shape: (B, T) of this pass. Raises `AlignmentError` for a batch of another size."""
    found: SlowTokens | None = getattr(cache, _KEY, None)
    if found is None or not cache.get_seq_length():
        return None
    if len(found.tokens) != shape[0]:
        raise AlignmentError(f"the cache holds slow tokens of {len(found.tokens)} prompts, the batch has {shape[0]}")
    asks = torch.ones(shape, dtype=torch.bool, device=device)
    return SlowTokens(found.tokens, found.of, found.valid, asks, found.kept)


def split_slow(
    tokens: Any, layouts: Sequence[VisualLayout] | None, picture: VisualLayout
) -> tuple[Tensor, list[Tensor], Sequence[VisualLayout]]:
    """Visual tokens as the connector gives them → those of the sequence ``(ΣM, L)``, each visual's slow ones ``(S, L)``, and the layouts.

    Args:
        tokens: ``(ΣM + ΣS, L)``, ``(images, M, L)`` or a sequence of ``(M + S, L)``.
        layouts: of the visuals; None: pictures alone, of layout ``picture``.
        picture: how a picture lies.

    Raises:
        AlignmentError: their number is not that of the layouts.
    """
    joined = tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens))
    joined = joined.reshape(-1, joined.shape[-1])
    layouts = [picture] * (len(joined) // picture.num_placeholders) if layouts is None else layouts
    counts = [layout.num_given for layout in layouts]
    if sum(counts) != len(joined):
        raise AlignmentError(
            f"{len(joined)} visual tokens for {len(layouts)} visuals of {counts}, fast and slow ones; was video_times given with them?"
        )
    fast, slow = [], []
    for part, layout in zip(joined.split(counts), layouts, strict=True):
        fast.append(part[: layout.num_placeholders])
        slow.append(part[layout.num_placeholders :] if layout.num_slow else part)
    return torch.cat(fast), slow, layouts


def lay_slow(
    slow: Sequence[Tensor], layouts: Sequence[VisualLayout], places: Tensor, position_ids: Tensor | None
) -> SlowTokens:
    """Slow tokens beside the rows of a batch in which their visuals stand.

    Args:
        slow: each visual's ``(S, L)``.
        layouts: of the same visuals.
        places: ``(B, T)`` bool, where visual tokens stand.
        position_ids: ``(B, T)``; they begin anew where rows hold several samples, none of which reads another's.

    Raises:
        AlignmentError: places and visuals differ in number.
    """
    batch, length = places.shape
    samples = torch.zeros_like(places, dtype=torch.long)
    if position_ids is not None and position_ids.shape == places.shape:
        samples[:, 1:] = (position_ids.diff(dim=1) != 1).cumsum(1)
    found = places.flatten().nonzero().flatten().tolist()
    if len(found) != (total := sum(layout.num_placeholders for layout in layouts)):
        raise AlignmentError(
            f"{len(found)} image placeholder tokens for {total} visual tokens; was the text made by this model's own processor and not "
            "truncated?"
        )
    of_samples = samples.flatten().tolist()
    rows: list[list[tuple[Tensor, int]]] = [[] for _ in range(batch)]
    used = 0
    for tokens, layout in zip(slow, layouts, strict=True):
        first = found[used]
        rows[first // length].append((tokens, of_samples[first]))
        used += layout.num_placeholders
    longest = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    joined, of = [], torch.full((batch, longest), -1, dtype=torch.long)
    for number, row in enumerate(rows):
        own = torch.cat([slow[0][:0], *(tokens for tokens, _ in row)])
        joined.append(torch.cat([own, own.new_zeros(longest - len(own), own.shape[-1])]))
        owners = [owner for tokens, owner in row for _ in range(len(tokens))]
        of[number, : len(owners)] = torch.tensor(owners, dtype=torch.long)
    of = of.to(places.device)
    valid = samples[:, :, None] == of[:, None, :]
    return SlowTokens(torch.stack(joined), of, valid, ~places)


def idle_slow(embeddings: Tensor) -> SlowTokens:
    """What a batch without visuals reads in training: one token that nobody sees, so that ranks reduce the same gradients.

    Args:
        embeddings: ``(B, T, L)``.
    """
    batch, length = embeddings.shape[:2]
    nothing = torch.full((batch, 1), -1, dtype=torch.long, device=embeddings.device)
    asks = torch.zeros(batch, length, dtype=torch.bool, device=embeddings.device)
    return SlowTokens(embeddings.new_zeros(batch, 1, embeddings.shape[-1]), nothing, nothing >= 0, asks)


def build_readers(fast: FastFrames, text: PreTrainedConfig) -> nn.ModuleDict:
    """The attention that layers 0, every, 2 · every … get, by the layer's number. text: the language model's config."""
    heads = text.num_attention_heads
    grouped = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = range(0, text.num_hidden_layers, fast.every)
    return nn.ModuleDict(
        {str(number): SlowTokenAttention(text.hidden_size, heads, grouped, width) for number in layers}
    )


def install_readers(decoder: nn.Module, readers: nn.ModuleDict, *, start: bool = False) -> None:
    """Let a decoder's layers read the `SlowTokens` among their arguments.

    Args:
        decoder: a language model without head; its layers get hooks, and their attention a way of its own around the one in use.
        readers: layer number → what reads there.
        start: whether keys and values begin as the layer's own.

    Raises:
        ConfigError: a decoder without layers of the usual form.
    """
    layers: Any = getattr(decoder, "layers", None) or ()
    for number, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        ours = str(number) in readers
        usual = hasattr(sys.modules.get(type(attention).__module__), "ALL_ATTENTION_FUNCTIONS")
        parts = (hasattr(attention, "config"), usual, isinstance(getattr(layer, "input_layernorm", None), nn.Module))
        if ours and not all(parts):
            break
        reader: Any = readers[str(number)] if ours else None
        layer.register_forward_pre_hook(partial(_hand_over, number, reader), with_kwargs=True)
        if reader is not None:
            own = copy.copy(attention.config)  # pyright: ignore[reportOptionalMemberAccess]
            setattr(own, _ORIGINAL, attention.config)  # pyright: ignore[reportOptionalMemberAccess]
            own._attn_implementation_internal = ATTENTION
            attention.config = own  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            if start:
                reader.start_from(attention.k_proj, attention.v_proj)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        if len(layers):
            return
    raise ConfigError(
        f"connector slow_fast: layers of {type(decoder).__name__} have another form than those that can read slow tokens; use another "
        "language model (llama, qwen2, qwen3 and mistral do) or another connector"
    )


@dataclass
class _Reading:
    """What one layer's attention is handed: its reader, and the slow tokens in the layer's own norm or their keys and values."""

    number: int
    reader: SlowTokenAttention
    slow: SlowTokens
    normed: Tensor | None
    pairs: tuple[Tensor, Tensor] | None

    def __call__(self, state: Tensor, query: Tensor) -> Tensor:
        self.slow.read.add(self.number)
        asks, valid = self.slow.asks.to(state.device), self.slow.valid.to(state.device)
        return self.reader(state, query, self.normed, asks=asks, valid=valid, pairs=self.pairs)


def _hand_over(number: int, reader: SlowTokenAttention | None, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a layer: what its attention reads, in place of what the pass brought; nothing for a layer that reads none."""
    found = kwargs.get(_KEY)
    if not isinstance(found, SlowTokens):
        return None
    rest = {key: value for key, value in kwargs.items() if key != _KEY}
    if reader is None:
        return args, rest
    hidden = args[0] if args else rest["hidden_states"]
    pairs = None if found.kept is None else found.kept.get(number)
    normed = None if pairs is not None else layer.input_layernorm(found.tokens.to(hidden.device, hidden.dtype))
    if found.kept is not None and normed is not None and not torch.is_grad_enabled():
        pairs = found.kept[number] = reader.pairs(normed)
    return args, {**rest, _KEY: _Reading(number, reader, found, normed, pairs)}


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The attention in use, and what its layer reads of the slow tokens."""
    reading: _Reading | None = kwargs.pop(_KEY, None)
    usual = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = getattr(module.config, _ORIGINAL)._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, usual)  # pyright: ignore[reportArgumentType]
    state, weights = attend(module, query, key, value, mask, **kwargs)
    if reading is None:
        return state, weights
    return reading(state.flatten(2), query.transpose(1, 2)).view_as(state), weights


AttentionInterface.register(ATTENTION, _attention)
