"""How do maps of former moments reach the present one: warped by the way driven, or fused (I2-World, arXiv 2507.09144)?

Written from a description of lzzzzzm/II-World, which has no licence file, and checked by its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class MapHistory:
    """The last maps of a stream of scenes seen from above, each warped into the present place. Samples keep their place in the batch.

    lower, cell: metres of the lower bounds and of a cell along x, y and z; frames: how many former maps are kept.
    """

    lower: tuple[float, float, float]
    cell: tuple[float, float, float]
    frames: int
    _maps: Tensor | None = field(default=None, init=False)
    _augmentation: Tensor | None = field(default=None, init=False)

    def step(self, maps: Tensor, to_previous: Tensor, augmentation: Tensor, start: Tensor) -> Tensor:
        """Former maps as they lie in the present one, newest first; the present one is remembered.

        At a sequence's start its former maps are copies of the present one, warped like any. As published, a sample's remembered
        augmentation is that of its sequence's start.

        Args:
            maps: ``(B, C, X, Y)``, the present ones, before quantisation.
            to_previous: ``(B, 4, 4)``, from the present vehicle's metres to the previous one's.
            augmentation: ``(B, 4, 4)`` of the present maps.
            start: ``(B,)``, true where a sequence begins; the first call begins all.

        Returns:
            ``(B, frames, C, X, Y)``, without gradient.
        """
        copies, start = maps.detach()[:, None].expand(-1, self.frames, -1, -1, -1), start.bool()
        if self._maps is None or self._augmentation is None:
            former, previous = copies, augmentation
        else:
            former = torch.where(start[:, None, None, None, None], copies, self._maps)
            previous = torch.where(start[:, None, None], augmentation, self._augmentation)
        warped = self._warped(former, self._cells(previous, to_previous, augmentation))
        self._maps = torch.cat([maps.detach()[:, None], warped], 1)[:, : self.frames]
        self._augmentation = previous
        return warped

    def _cells(self, previous: Tensor, to_previous: Tensor, augmentation: Tensor) -> Tensor:
        """From the present map's cells to the former one's, ``(B, 4, 4)`` in float64."""
        metres = torch.diag(torch.tensor([*self.cell, 1.0], dtype=torch.float64, device=previous.device))
        metres[:3, 3] = torch.tensor(self.lower, dtype=torch.float64, device=previous.device)
        back = torch.linalg.inv(augmentation.double())
        return torch.linalg.inv(metres) @ previous.double() @ to_previous.double() @ back @ metres

    def _warped(self, former: Tensor, cells: Tensor) -> Tensor:
        columns, rows = former.shape[-2:]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack([x, y, torch.zeros_like(x), torch.ones_like(x)], -1).to(cells).flatten(0, 1)
        there = (cells @ places.T).transpose(1, 2)[..., :2].unflatten(1, (rows, columns))
        size = torch.tensor([columns - 1, rows - 1]).to(there)
        maps = former.flatten(1, 2).transpose(-2, -1).float()
        seen = F.grid_sample(maps, (2 * there / size - 1).float(), mode="bilinear", align_corners=True)
        return seen.transpose(-2, -1).unflatten(1, former.shape[1:3]).to(former.dtype)


class HistoryFusion(nn.Module):
    """Present tokens that have read the former ones at the same place: two small MLPs over all of them side by side, and the tokens
    themselves. frames: number of former ones."""

    def __init__(self, width: int, frames: int, dropout: float = 0.0):
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(width * (frames + 1), width), nn.ReLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, history: Tensor) -> Tensor:
        """``(B, N, C)``, their positions in the same shape and the former ones ``(B, N, frames * C)`` → ``(B, N, C)``."""
        joined = torch.cat([tokens + positions, history], -1)
        return tokens + self.dropout(self.out(self.fuse(joined)))
