"""How do pixels become visual tokens? Encoders → router → connector, the same code in HF, training and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm.connectors.build import build_connector, connector_config
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import AlignmentError, ConfigError
from mllm.types import Routing, VisionFeatures


class EncoderBank(nn.Module):
    """The named encoders of a model (and its router): pixels → features by encoder name.

    A routed encoder runs only on the images whose routing weight for it is not zero; on the others its features are zeros.
    """

    def __init__(self, encoders: Mapping[str, Any], router: Mapping[str, Any] | None = None, text_width: int = 0):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: build_encoder(encoder_config(config, where=f"encoders.{name}")) for name, config in encoders.items()}
        )
        self.infos = {name: e.describe(e.config) for name, e in self.encoders.items()}
        self.experts: tuple[str, ...] = tuple((router or {}).get("experts", ()))
        self.with_attention: frozenset[str] = frozenset()
        """Encoders whose last attention map the connector reads."""
        self.router: nn.Module | None = None
        if router is not None:
            from mllm.routers.build import build_router

            unknown = [name for name in self.experts if name not in self.encoders]
            if unknown:
                raise ConfigError(f"router.experts: {unknown[0]!r} is no encoder of this model; it has {list(self.encoders)}")
            summary = sum(self.infos[name].width for name in self.always_on)
            self.router = build_router(dict(router), summary, text_width)

    @property
    def always_on(self) -> list[str]:
        """Names of the encoders that run on every image."""
        return [name for name in self.encoders if name not in self.experts]

    def route(self, features: Mapping[str, VisionFeatures], text: Tensor | None, allowed: Tensor | None = None) -> Routing:
        """Ask the router, given the always-on encoders' features of B images and the questions' mean embedding."""
        assert self.router is not None
        parts = [features[name].tokens.mean(dim=1) for name in self.always_on]
        if parts:
            summary = torch.cat(parts, dim=-1)
        else:
            assert text is not None
            summary = text.new_zeros(text.shape[0], 0)
        return self.router(summary, text, allowed)

    def forward(
        self,
        pixels: Mapping[str, Tensor],
        *,
        expert_weights: Tensor | None = None,
        text: Tensor | None = None,
    ) -> tuple[dict[str, VisionFeatures], Routing | None]:
        """pixels: encoder name → ``(B, 3, H, W)``; expert_weights ``(B, E)`` fixes the routing (rows of NaN: not fixed);
        text ``(B, L)``. Returns features in the model's order and the routing, None for a model without router."""
        missing = [name for name in self.encoders if name not in pixels]
        if missing:
            raise AlignmentError(f"no pixels for encoder {missing[0]!r}; got {sorted(pixels)}, need {list(self.encoders)}")
        counts = {name: pixels[name].shape[0] for name in self.encoders}
        if len(set(counts.values())) > 1:
            raise AlignmentError(f"encoders were given different numbers of images: {counts}")
        features: dict[str, VisionFeatures] = {name: self._encode(name, pixels[name]) for name in self.always_on}
        routing = self._routing(features, expert_weights, text) if self.experts else None
        if routing is not None:
            for index, name in enumerate(self.experts):
                features[name] = self._encode_routed(name, pixels[name], routing.weights[:, index])
        return {name: features[name] for name in self.encoders}, routing

    def _encode(self, name: str, pixels: Tensor) -> VisionFeatures:
        encoder = self.encoders[name]
        parameter = next(encoder.parameters(), None)
        pixels = pixels if parameter is None else pixels.to(parameter.device, parameter.dtype)
        return encoder(pixels, return_attention=True) if name in self.with_attention else encoder(pixels)

    def _encode_routed(self, name: str, pixels: Tensor, weights: Tensor) -> VisionFeatures:
        rows = weights.detach().ne(0).nonzero(as_tuple=True)[0]
        info, encoder = self.infos[name], self.encoders[name]
        learns = self.training and any(p.requires_grad for p in encoder.parameters())
        if len(rows) == len(weights) and len(rows):
            return self._encode(name, pixels)
        parameter = next(encoder.parameters(), pixels)
        tokens = torch.zeros(
            len(weights), info.grid[0] * info.grid[1], info.width, dtype=parameter.dtype, device=pixels.device
        )
        if len(rows):
            chosen = self._encode(name, pixels[rows])
            tokens = tokens.to(chosen.tokens.dtype).index_copy(0, rows, chosen.tokens)
        elif learns and len(pixels):
            # Every rank must touch the same parameters, or ZeRO-1/2 reduces the wrong gradients (see docs in train/engine).
            tokens = tokens + 0.0 * self._encode(name, pixels[:1]).tokens.sum()
        return VisionFeatures(tokens, info.grid)

    def _routing(self, features: Mapping[str, VisionFeatures], fixed: Tensor | None, text: Tensor | None) -> Routing:
        if fixed is not None and fixed.shape[-1] != len(self.experts):
            raise AlignmentError(f"expert_weights has {fixed.shape[-1]} columns, the model {len(self.experts)} experts {self.experts}")
        if fixed is not None and not fixed.isnan().any():
            return Routing(self.experts, fixed)
        routing = self.route(features, text)
        if fixed is not None:
            free = fixed.isnan().any(dim=-1, keepdim=True)
            routing.weights = torch.where(free, routing.weights, fixed.to(routing.weights))
        return routing


def build_visual_parts(config: Any) -> tuple[EncoderBank | None, nn.Module | None]:
    """Encoder bank and connector of an `MllmConfig`; both None for a text-only model."""
    if config.connector is None:
        return None, None
    width = config.get_text_config().hidden_size
    bank = EncoderBank(config.encoders, config.router, text_width=width)
    connector = build_connector(connector_config(config.connector), bank.infos, width)
    bank.with_attention = frozenset(connector.attention_from(connector.config, bank.infos))
    return bank, connector
