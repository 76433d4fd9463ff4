"""How does one encoder of a model read another's features in place of pixels?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mllm.encoders import ENCODERS
from mllm.encoders.catalogue import encoder_config, expanded
from mllm.errors import AlignmentError, ConfigError, did_you_mean
from mllm.types import VisionFeatures, VisualLayout


def encoder_configs(specs: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The resolved configs of all encoders of a model, those that read another's features after it.

    Args:
        specs: name → what a recipe says of it.
        where: what an error begins with, as ``model.encoders``.

    Returns:
        Name → config, in the order of ``specs``.

    Raises:
        ConfigError: an encoder does not exist, cannot read features, or they read each other in a circle.
    """
    found: dict[str, Any] = {}
    waiting = {name: expanded(value, f"{where}.{name}") for name, value in specs.items()}
    while waiting:
        ready = [name for name, data in waiting.items() if _source(data) is None or _source(data) in found]
        if not ready:
            name, data = next(iter(waiting.items()))
            raise ConfigError(f"{where}.{name}.reads: {_why_not(name, _source(data), specs)}")
        for name in ready:
            data = waiting.pop(name)
            found[name] = encoder_config(_told(data, found, f"{where}.{name}"), where=f"{where}.{name}")
    return {name: found[name] for name in specs}


def _source(data: Mapping[str, Any]) -> str | None:
    reads = data.get("reads")
    return reads.get("encoder") if isinstance(reads, Mapping) else reads


def _why_not(name: str, source: str | None, specs: Collection[str]) -> str:
    if source in specs:
        return f"{name} and {source} read each other in a circle; one of them must read pixels"
    return f"{source!r} is no encoder of this model{did_you_mean(str(source), specs) or '.'} It has {', '.join(specs)}"


def _told(data: dict[str, Any], found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The data of an encoder with the sizes of what it reads."""
    source = _source(data)
    if source is None:
        return data
    kind = data.get("type")
    if kind in ENCODERS and not ENCODERS.get(str(kind)).reads_features:
        able = [name for name in ENCODERS if ENCODERS.get(name).reads_features]
        raise ConfigError(
            f"{where}.reads: type {kind} reads pixels only; what reads another encoder's features: {', '.join(able)}"
        )
    info = found[source].resolved_info
    if info.image.patch is not None:
        raise ConfigError(
            f"{where}.reads: {source} sees pictures at their own aspect (views native), and its features have no fixed grid"
        )
    return {**data, "reads": {"encoder": source, "width": info.width, "grid": info.grid}}


def reading_order(reads: Mapping[str, str | None]) -> list[str]:
    """Names so that each encoder comes after the one that it reads. reads: name → whom it reads (None: pixels)."""
    order: list[str] = []
    while len(order) < len(reads):
        more = [name for name, source in reads.items() if name not in order and (source is None or source in order)]
        if not more:
            raise ConfigError(
                f"encoders: {', '.join(set(reads) - set(order))} read encoders that are not there, or each other"
            )
        order += more
    return order


def features_for(
    reader: str, source: str, features: VisionFeatures, layouts: Sequence[VisualLayout] | None
) -> VisionFeatures:
    """What an encoder is given of another's features: a row for each of its own. Of a video of which the other sees fewer frames, those of
    the frame before stand for a frame that it does not see, as everywhere.

    Args:
        reader: the encoder's name.
        source: whose features these are.
        features: of all views, ``(V, N, D)``.
        layouts: of all visuals; None: one view each.

    Returns:
        The same features, rows chosen.

    Raises:
        AlignmentError: a picture has other views for the two.
    """
    if layouts is None or all(layout.rows_of(reader) == layout.rows_of(source) for layout in layouts):
        return features
    rows, start = [], 0
    for layout in layouts:
        theirs, own = layout.frames_of(source), layout.frames_of(reader)
        if not layout.frames and len(theirs) != len(own):
            raise AlignmentError(
                f"encoder {reader} reads {source}, which sees {len(theirs)} views of a picture and {reader} {len(own)}; leave "
                "model.views out"
            )
        rows += [start + max(k for k, frame in enumerate(theirs) if frame <= wanted) for wanted in own]
        start += len(theirs)
    chosen = torch.tensor(rows, device=features.tokens.device)
    return VisionFeatures(features.tokens[chosen], features.grid)
