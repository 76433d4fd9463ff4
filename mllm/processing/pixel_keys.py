"""Under which name do an encoder's pixels travel in a batch?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

PRIMARY_PIXELS = "pixel_values"


class PixelKeys(dict[str, str]):
    """Encoder name → key of its pixels, in the model's order: ``pixel_values`` for the first (the name HF and vLLM know),
    ``pixel_values_<name>`` for the others."""

    def __init__(self, encoders: Iterable[str]):
        super().__init__(
            {name: PRIMARY_PIXELS if i == 0 else f"{PRIMARY_PIXELS}_{name}" for i, name in enumerate(encoders)}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (list(self),))

    def by_encoder(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encoder name → its pixels, of those that ``inputs`` hold."""
        return {name: inputs[key] for name, key in self.items() if inputs.get(key) is not None}

    def pop(self, inputs: MutableMapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """`by_encoder`, taken out of ``inputs`` (the keys of encoders without pixels too)."""
        found = {name: inputs.pop(key, None) for name, key in self.items()}
        return {name: pixels for name, pixels in found.items() if pixels is not None}

    def by_key(self, pixels: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels by encoder name → the same by batch key."""
        return {self[name]: value for name, value in pixels.items()}

    def split(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what is pixels, what is not), by batch key."""
        keys = set(self.values())
        return {k: v for k, v in data.items() if k in keys}, {k: v for k, v in data.items() if k not in keys}
