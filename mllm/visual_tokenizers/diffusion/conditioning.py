"""What does the denoiser see of a picture's codes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.types import Grid


@dataclass(frozen=True)
class Conditions:
    """channels: maps ``(B, K, H, W)`` that go beside what is denoised; tokens: a sequence ``(B, N, D)`` to attend to; kept: maps that
    stand without conditions too (of a picture that is edited, its mask and what is kept); apart: maps by name that branches see."""

    channels: Tensor | None = None
    tokens: Tensor | None = None
    kept: Tensor | None = None
    apart: Mapping[str, Tensor] = field(default_factory=dict)

    def without(self) -> Conditions:
        """The same with all codes zero: what guidance leads away from."""
        apart = {name: torch.zeros_like(value) for name, value in self.apart.items()}
        return Conditions(_zeros(self.channels), _zeros(self.tokens), self.kept, apart)

    def joined(self, other: Conditions) -> Conditions:
        """Both batches, one after the other."""
        apart = {name: torch.cat([value, other.apart[name]]) for name, value in self.apart.items()}
        channels, tokens = _cat(self.channels, other.channels), _cat(self.tokens, other.tokens)
        return Conditions(channels, tokens, _cat(self.kept, other.kept), apart)

    def seen(self, names: Sequence[str]) -> Tensor:
        """What a branch sees ``(B, M, H, W)``, in the order of the names."""
        maps = [self.kept if name == "source" else self.apart[name] for name in names]
        return torch.cat([one for one in maps if one is not None], 1)

    def beside(self, noisy: Tensor, *, kept: bool = True) -> Tensor:
        """What is denoised, then the maps ``(B, C + K, H, W)``; kept: those of an edited picture too."""
        shown = (self.channels, self.kept if kept else None)
        return torch.cat([noisy, *(maps.to(noisy.dtype) for maps in shown if maps is not None)], 1)


def _zeros(value: Tensor | None) -> Tensor | None:
    return None if value is None else torch.zeros_like(value)


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def code_map(vectors: Mapping[str, Tensor], grids: Mapping[str, Grid], grid: Grid, size: Grid) -> Tensor:
    """Code vectors ``(B, N, D)`` of every codebook as one map ``(B, ΣD, *size)`` in the codebooks' order (ILLUME+: semantic, then pixel):
    each resized (bicubic) to ``grid``, the whole then to what is denoised, to the nearest."""
    maps = []
    for name, value in vectors.items():
        one = value.float().transpose(1, 2).unflatten(2, tuple(grids[name]))
        if tuple(one.shape[-2:]) != tuple(grid):
            one = F.interpolate(one, size=tuple(grid), mode="bicubic", align_corners=False)
        maps.append(one)
    whole = torch.cat(maps, 1)
    return whole if tuple(whole.shape[-2:]) == tuple(size) else F.interpolate(whole, size=tuple(size), mode="nearest")


class CodeSequence(nn.Module):
    """Code vectors as a sequence to attend to: a linear layer and learned positions for every codebook.

    dims: codebook → width of its vectors; positions: codebook → N; width: of the sequence.
    """

    def __init__(self, dims: Mapping[str, int], positions: Mapping[str, int], width: int):
        super().__init__()
        self.project = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in dims.items()})
        self.positions = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(positions[name], width) * 0.02) for name in dims}
        )

    def forward(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """codebook → ``(B, N, D)`` gives ``(B, ΣN, width)``."""
        return torch.cat(
            [self.project[name](value.float()) + self.positions[name] for name, value in vectors.items()], 1
        )
