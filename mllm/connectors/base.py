"""What is a connector here?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.connectors.joining import close_rows, hold_frames, join_views, spread_views
from mllm.errors import AlignmentError
from mllm.types import EncoderInfo, Grid, Routing, ViewLayout, VisionFeatures, VisualLayout


class ConnectorConfig(StrictModel):
    """What every connector's config has."""

    type: str
    zero_init_output: bool = False
    """The last layer starts at zero, so every visual token is the zero vector until training moves it."""
    feature_norm: Literal["layer_norm", "rms_norm"] | None = None
    """A learned norm over the channels of every encoder's features, before anything else. For encoders whose last layer has no norm
    of its own (convolutions), or whose features differ in scale: one that grows does not drown its neighbours."""


class Connector(nn.Module):
    """Features of one or several encoders to visual tokens of language-model width."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[ConnectorConfig]] = ConnectorConfig
    config: ConnectorConfig
    uses_routing: ClassVar[bool] = False
    """Whether `forward` takes experts' weights; others get absent experts' features as zeros."""

    def __init__(self, config: ConnectorConfig, encoders: Mapping[str, EncoderInfo], width: int):
        """encoders: name → sizes, in the model's order; width: L, the language model's hidden size."""
        super().__init__()
        self.config, self.encoders, self.width = config, dict(encoders), width
        self.register_forward_pre_hook(_every_frame, with_kwargs=True)
        if kind := config.feature_norm:
            norm = nn.LayerNorm if kind == "layer_norm" else nn.RMSNorm
            self.feature_norms = nn.ModuleDict(
                {name: norm(info.width, eps=1e-5) for name, info in self.encoders.items()}
            )
            self.register_forward_pre_hook(_norm_features)
        self.register_parameter("newline", None)
        self.register_parameter("opening", None)
        self.opening: nn.Parameter | None
        """``(L,)``: stands before a visual, for views that ask for it (`add_opening`)."""
        self.newline: nn.Parameter | None
        """``(L,)``: closes the rows of a visual that is seen in several views, for views that ask for it (`add_newline`)."""

    @property
    def token_width(self) -> int:
        """Width of what `forward` gives for a token: L, L more for each of the layout's levels, and what lies beside it."""
        return self.width * (1 + getattr(self.config, "levels", 0))

    def readers(self) -> dict[int, nn.Module]:
        """Layer of the language model → module that runs behind it on the visual tokens' hidden states.

        Returns:
            Modules that take hidden states ``(n, L)`` and what the layout has ``beside`` them ``(n, X)``, and give ``(n, L)``;
            none by default.
        """
        return {}

    def __init_subclass__(cls, **kwargs: Any):
        """A connector written when a visual had one view gives ``(B, M, L)`` from `forward`: that is its `view_tokens`."""
        super().__init_subclass__(**kwargs)
        forward = cls.__dict__.get("forward")
        if forward is not None and "layouts" not in inspect.signature(forward).parameters:
            cls.view_tokens = forward
            del cls.forward

    @classmethod
    def layout(cls, config: ConnectorConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        """How many tokens one view becomes. Pure arithmetic.

        Args:
            config: the connector's config.
            encoders: encoder name → sizes, in the model's order.

        Returns:
            Number of tokens M, and rows and columns of those that carry position.

        Raises:
            ConfigError: an encoder's grid does not fit.
        """
        raise NotImplementedError

    @classmethod
    def native_cell(cls, config: ConnectorConfig) -> int | None:
        """For views native, `ViewLayout.cell`.

        Args:
            config: the connector's config.

        Returns:
            Side in tokens of the square that becomes one; 0 where the number of tokens is fixed; None for a connector that is built for one
            grid.
        """
        return None

    @classmethod
    def attention_from(cls, config: ConnectorConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, int]:
        """Encoders whose last attention map `forward` reads (`VisionFeatures.attention`).

        Args:
            config: the connector's config.
            encoders: encoder name → sizes, in the model's order.

        Returns:
            Encoder name → number of heads it expects; empty for a connector that reads no attention.
        """
        return {}

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        """The smallest sensible (config, encoders, width); the contract tests build it."""
        raise NotImplementedError

    def output_layers(self) -> list[nn.Module]:
        """Layers that are zero at the start under ``zero_init_output``."""
        return []

    def reset_parameters(self) -> None:
        """Fresh initial values for every parameter (children first), for instance after building on the meta device."""
        for module in reversed(list(self.modules())):
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        for token in (self.newline, self.opening):
            if token is not None:
                nn.init.normal_(token, std=1 / math.sqrt(self.width))
        if self.config.zero_init_output:
            for layer in self.output_layers():
                for parameter in layer.parameters(recurse=False):
                    nn.init.zeros_(parameter)

    def add_newline(self) -> None:
        """Give the connector a learned newline token (LLaVA-NeXT's ``image_newline``)."""
        self.newline = nn.Parameter(torch.empty(self.token_width))
        nn.init.normal_(self.newline, std=1 / math.sqrt(self.width))

    def add_opening(self) -> None:
        """Give the connector a learned token that stands before a visual (EVEv2's class token)."""
        self.opening = nn.Parameter(torch.empty(self.token_width))
        nn.init.normal_(self.opening, std=1 / math.sqrt(self.width))

    def forward(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None = None,
        text: Tensor | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        """Join the features of all views of B visuals.

        Args:
            features: encoder name → features of all views.
            routing: which experts ran on the B visuals; None without a router.
            text: ``(B, L)``, the question's summary, for connectors that look at it.
            layouts: how each visual lies in the sequence; None: one view each.

        Returns:
            Visual tokens ``(ΣM, L)``, one visual after another.

        Raises:
            AlignmentError: features lie on other grids than the visuals (views native).
        """
        if layouts is None:
            return self.view_tokens(features, routing, text).flatten(0, 1)
        if any(layout.patches is not None for layout in layouts):
            return self._native_tokens(features, layouts, routing, text)
        features = spread_views(features, layouts)
        routing, text = _per_view(layouts, routing, text)
        tokens = self.view_tokens(features, routing, text)
        return join_views(tokens, layouts, self.layout(self.config, self.encoders), self.newline)

    def _native_tokens(
        self,
        features: Mapping[str, VisionFeatures],
        layouts: Sequence[VisualLayout],
        routing: Routing | None,
        text: Tensor | None,
    ) -> Tensor:
        """Visuals that have grids of their own: those with the same one are joined together, and told apart again."""
        grids = [layout.patches or (0, 0) for layout in layouts]
        infos, parts = self.encoders, {}
        for name, found in features.items():
            if found.grids != tuple(grids):
                raise AlignmentError(
                    f"features of encoder {name!r} lie on {found.grids}, the visuals on {tuple(grids)}"
                )
            parts[name] = found.tokens[0].split([_of_grid(infos[name], grid).num_tokens for grid in grids])
        tokens: list[Tensor] = [next(iter(features.values())).tokens] * len(layouts)
        for grid in dict.fromkeys(grids):
            members = [number for number, other in enumerate(grids) if other == grid]
            self.encoders = {name: _of_grid(info, grid) for name, info in infos.items()}
            try:
                own = {n: VisionFeatures(torch.stack([rows[m] for m in members]), grid) for n, rows in parts.items()}
                made = self.view_tokens(own, routing, None if text is None else text[members])
            finally:
                self.encoders = infos
            for number, part in zip(members, made):
                map_block = max(layouts[number].blocks, key=lambda block: block.num_tokens * (not block.ids))
                tokens[number] = close_rows(part, map_block, self.newline, self.opening)
        return torch.cat(tokens)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Join the features of V views; V = 0 is legal.

        Args:
            features: encoder name → features of V views. An expert that no view of the batch uses may be absent.
            routing: which experts ran on the V views; None without a router.
            text: ``(V, L)``, the question's summary, for connectors that look at it.

        Returns:
            Visual tokens ``(V, M, L)``.
        """
        raise NotImplementedError


def _every_frame(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before `forward`, whichever class defines it: an encoder that is given fewer frames of a video than its neighbours has all."""
    layouts = named.get("layouts", arguments[3] if len(arguments) > 3 else None)
    if not layouts or not any(layout.frames and layout.fewer for layout in layouts):
        return arguments, named
    if arguments:
        return (hold_frames(arguments[0], layouts), *arguments[1:]), named
    return arguments, {**named, "features": hold_frames(named["features"], layouts)}


def _norm_features(connector: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before `forward`, whichever class defines it: every encoder's features pass the norm that is theirs."""
    features, *others = arguments
    norms = connector.feature_norms
    normed = {name: replace(found, tokens=norms[name](found.tokens)) for name, found in features.items()}
    for absent in (
        norms.keys() - features.keys()
    ):  # ranks reduce the same gradients, whichever experts their images ask for
        name, found = next(iter(normed.items()))
        unused = sum(0.0 * parameter.sum() for parameter in norms[absent].parameters())
        normed[name] = replace(found, tokens=found.tokens + unused)
    return normed, *others


def _of_grid(info: EncoderInfo, grid: Grid) -> EncoderInfo:
    return info.model_copy(update={"grid": grid})


def _per_view(
    layouts: Sequence[VisualLayout], routing: Routing | None, text: Tensor | None
) -> tuple[Routing | None, Tensor | None]:
    """Routing and text of visuals, repeated for each of their views."""
    counts = [layout.num_views for layout in layouts]
    if all(count == 1 for count in counts):
        return routing, text
    repeats = torch.tensor(counts)
    if routing is not None:
        weights = routing.weights.repeat_interleave(repeats.to(routing.weights.device), dim=0)
        routing = Routing(routing.experts, weights, routing.logits, routing.losses)
    return routing, None if text is None else text.repeat_interleave(repeats.to(text.device), dim=0)
