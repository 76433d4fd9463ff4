"""How does every encoder of several learn, and not only the one that is easier to listen to? ``options.drop_encoders`` of a stage.

Joined encoders compete: the one whose features lower the loss first leaves the others without gradient before they are of use (Wu et al.,
arXiv 2202.05306). While the stage learns, a share of the pictures is therefore seen without one encoder: its features are zeros, as
ModDrop (arXiv 1501.00102) does with modalities. Nothing changes once it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.errors import ConfigError, did_you_mean
from mllm.types import VisionFeatures, VisualLayout

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


def check_chances(chances: Mapping[str, float], where: str) -> None:
    """Raises `ConfigError` unless each chance lies between 0 and 1, and all together do."""
    for name, chance in chances.items():
        if not 0 <= chance <= 1:
            raise ConfigError(f"{where}.{name}: {chance:g} is no share of pictures; expected 0 to 1")
    if sum(chances.values()) > 1 + 1e-9:
        raise ConfigError(
            f"{where}: shares of pictures that lose one encoder each sum to {sum(chances.values()):g}; at most 1 together"
        )


class DropEncoders:
    """Before the connector, in training: each picture loses at most one encoder, by the chances given."""

    def __init__(self, chances: Mapping[str, float], model: MllmForConditionalGeneration, where: str):
        """Raises `ConfigError` for an encoder that is not there, is routed, is the only one, or sees pictures at their own size."""
        inner = model.model
        tower = inner.vision_tower
        names, experts = ([], []) if tower is None else (list(tower.encoders), list(tower.experts))
        for name in chances:
            if name not in names:
                raise ConfigError(
                    f"{where}: the model has no encoder {name!r}{did_you_mean(name, names)} (it has {', '.join(names) or 'none'})"
                )
            if name in experts:
                raise ConfigError(
                    f"{where}: {name} is an expert, which the router switches off by itself; leave it out"
                )
        if len(names) < 2:
            raise ConfigError(f"{where}: {', '.join(names)} is the only encoder; without it a picture is not seen")
        if inner.rules.native:
            raise ConfigError(f"{where}: not with views native, where pictures come as patches; leave it out")
        self.chances, self._connector = dict(chances), inner.multi_modal_projector

    def attach(self) -> Any:
        """The handle that ends it."""
        return self._connector.register_forward_pre_hook(self._drop, with_kwargs=True)

    def _drop(self, connector: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
        if not connector.training:
            return None
        features = arguments[0] if arguments else named["features"]
        layouts = named.get("layouts", arguments[3] if len(arguments) > 3 else None)
        features = self.thinned(features, layouts)
        return ((features, *arguments[1:]), named) if arguments else (arguments, {**named, "features": features})

    def thinned(
        self, features: Mapping[str, VisionFeatures], layouts: list[VisualLayout] | None
    ) -> dict[str, VisionFeatures]:
        """Features in which a picture's views lose the same encoder; one draw a picture, so that no picture loses two."""
        first = next(iter(features.values())).tokens
        draw = torch.rand(len(first) if layouts is None else len(layouts), device=first.device)
        found, start = dict(features), 0.0
        for name, chance in self.chances.items():
            kept = ~((draw >= start) & (draw < start + chance))
            start += chance
            if name in found:
                rows = kept if layouts is None else _by_view(kept, [layout.rows_of(name) for layout in layouts])
                tokens = found[name].tokens
                found[name] = replace(found[name], tokens=tokens * rows[:, None, None].to(tokens.dtype))
        return found


def _by_view(kept: Tensor, counts: list[int]) -> Tensor:
    if all(count == 1 for count in counts):
        return kept
    return kept.repeat_interleave(torch.tensor(counts, device=kept.device), dim=0)
