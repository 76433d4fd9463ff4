"""How do the two requests behind a ``language_model`` routing share one run of the always-on encoders?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.types import VisionFeatures


@dataclass
class _Entry:
    pixels: dict[str, Tensor]
    features: dict[str, VisionFeatures]


class FeatureMemory:
    """Features of the always-on encoders, kept from a routing request to the answer that follows it.

    Pictures are recognised by their pixels, compared value by value, so no two pictures are ever mistaken for one
    another. At most ``size`` pictures are kept, the newest; a picture is forgotten when its answer took it.
    """

    def __init__(self, bank: Any, size: int = 64):
        self.bank, self.size = bank, size
        self._entries: OrderedDict[float, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def encode(self, pixels: Mapping[str, Tensor], keep: list[bool]) -> dict[str, VisionFeatures]:
        """`EncoderBank.encode_base` of B images, running only those that are not remembered. keep: per image, whether
        its answer is still to come."""
        names = self.bank.always_on
        sums = torch.stack([pixels[name].float().sum(dim=(1, 2, 3)) for name in names]).sum(dim=0).tolist()
        found = [self._take(key, {name: pixels[name][row] for name in names}) for row, key in enumerate(sums)]
        fresh = [row for row, features in enumerate(found) if features is None]
        if fresh:
            encoded = self.bank.encode_base({name: value[fresh] for name, value in pixels.items()})
            for position, row in enumerate(fresh):
                found[row] = {name: _rows(features, position) for name, features in encoded.items()}
        for row, key in enumerate(sums):
            features = found[row]
            if keep[row] and features is not None:
                own = {name: pixels[name][row].clone() for name in names}
                self._entries[key] = _Entry(own, features)
                self._entries.move_to_end(key)
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)
        rows = [features for features in found if features is not None]
        return {name: _joined([features[name] for features in rows]) for name in names}

    def _take(self, key: float, pixels: Mapping[str, Tensor]) -> dict[str, VisionFeatures] | None:
        entry = self._entries.get(key)
        if entry is None or not all(torch.equal(entry.pixels[name], value) for name, value in pixels.items()):
            return None
        return self._entries.pop(key).features


def _rows(features: VisionFeatures, row: int) -> VisionFeatures:
    pick = slice(row, row + 1)
    return VisionFeatures(
        features.tokens[pick],
        features.grid,
        None if features.prefix is None else features.prefix[pick],
        None if features.attention is None else features.attention[pick],
    )


def _joined(rows: list[VisionFeatures]) -> VisionFeatures:
    first = rows[0]
    return VisionFeatures(
        torch.cat([row.tokens for row in rows]),
        first.grid,
        None if first.prefix is None else torch.cat([row.prefix for row in rows if row.prefix is not None]),
        None if first.attention is None else torch.cat([row.attention for row in rows if row.attention is not None]),
    )
