"""How does a decoder keep weights of its own for visual tokens (EVEv2's divide-and-conquer, arXiv 2502.06788)?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import ConfigError

_SWITCHED = ("input_layernorm", "post_attention_layernorm", "mlp")
_SWITCHED_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class VisualPlaces:
    """Where the visual tokens of the present forward pass are: ``mask`` ``(B, T)``, None where there are none. It stays until
    the next pass, so that what is recomputed in the backward pass finds it."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None


class ModalitySwitch(nn.Module):
    """``text(x) · (1 - m) + visual(x) · m``, m 1 at visual tokens. Steps that hold none, as every one after the prompt does, run
    the text weights alone."""

    def __init__(self, text: nn.Module, visual: nn.Module, places: VisualPlaces | None = None):
        super().__init__()
        self.text, self.visual, self.places = text, visual, places or VisualPlaces()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x ``(B, T, C)``; mask ``(B, T)`` or ``(B, T, 1)``, by default the present pass's."""
        mask = self.places.mask if mask is None else mask
        if mask is None or mask.shape[:2] != x.shape[:2]:
            found = self.text(x)
            if self.training and torch.is_grad_enabled():  # ranks reduce the same gradients, with or without pictures
                found = found + 0.0 * sum(p.sum() for p in self.visual.parameters() if p.requires_grad)
            return found
        mask = mask if mask.dim() == 3 else mask[..., None]
        return torch.where(mask.bool(), self.visual(x), self.text(x))


def install_switch(decoder: nn.Module) -> VisualPlaces:
    """Give every layer of a decoder a copy of its norms, projections and MLP for visual tokens, equal at the start. Raises
    `ConfigError` for a decoder that has no such parts."""
    places = VisualPlaces()
    layers: Any = getattr(decoder, "layers", None)
    if layers is None or not len(layers):
        raise ConfigError("language_model.modality_switch: this decoder has no layers of the usual form")
    for number, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        owners = [(layer, name) for name in _SWITCHED] + [(attention, name) for name in _SWITCHED_ATTENTION]
        missing = [name for owner, name in owners if not isinstance(getattr(owner, name, None), nn.Module)]
        if missing:
            raise ConfigError(
                f"language_model.modality_switch: layer {number} of this decoder has no {missing[0]}; llama, mistral and qwen2 have"
            )
        for owner, name in owners:
            text = getattr(owner, name)
            setattr(owner, name, ModalitySwitch(text, copy.deepcopy(text), places))
    return places
