"""Which weights does a routing written by hand mean?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError, UnknownName


def fixed_weights(experts: Any, pool: Sequence[str]) -> Tensor:
    """``(1, E)`` fp32 weights of one routing.

    experts: names, which share the weight equally; one string of names separated by commas; name → weight; ``[]`` or
    ``"none"`` runs no expert; None leaves the choice to the router (NaN). Raises `UnknownName` for a name that is not in
    ``pool`` and `ConfigError` for anything that names nothing.
    """
    if experts is None:
        return torch.full((1, len(pool)), float("nan"))
    if isinstance(experts, str):
        experts = [] if experts.strip() == "none" else [name.strip() for name in experts.split(",")]
    if isinstance(experts, Mapping):
        weights = dict(experts)
    elif isinstance(experts, Iterable):
        names = list(dict.fromkeys(experts))
        weights = {name: 1.0 / len(names) for name in names}
    else:
        raise ConfigError(f"experts is {experts!r}; expected names of {', '.join(pool) or 'no expert'}, or 'none'")
    for name, weight in weights.items():
        if name == "":
            raise ConfigError(
                f"experts names nothing; expected names of {', '.join(pool)}, or 'none' (or []) for no expert"
            )
        if name not in pool:
            raise UnknownName("expert", name, pool)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"experts: the weight of {name!r} is {weight!r}; a weight is a number from 0 on")
    return torch.tensor([[float(weights.get(name, 0.0)) for name in pool]]).reshape(1, len(pool))


def fixed_weights_of(experts: Any, pool: Sequence[str], num_images: int) -> Tensor:
    """``(num_images, E)``: one routing for all images, or a list with one entry (names, mapping, ``"none"``, None) per
    image. Raises `AlignmentError` when the list has another length."""
    each = isinstance(experts, (list, tuple)) and any(not isinstance(entry, str) for entry in experts)
    if not each:
        return fixed_weights(experts, pool).repeat(num_images, 1)
    if len(experts) != num_images:
        raise AlignmentError(
            f"experts has {len(experts)} entries for {num_images} images; give one per image, or one for all"
        )
    return torch.cat([fixed_weights(entry, pool) for entry in experts])
