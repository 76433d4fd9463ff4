"""How is a map written as codes of its scales, then as codes of what earlier frames do not explain (I2-World, arXiv 2507.09144)?

Written from a description of lzzzzzm/II-World, which has no licence file, and checked by its numbers; its weights are not for us to ship.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.visual_tokenizers.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    batch_usage,
    check_input,
    straight_through,
)
from mllm.visual_tokenizers.quantizers.codebook import Codebook, CodebookConfig
from mllm.visual_tokenizers.quantizers.search import nearest_codes


class IntraInterQuantizerConfig(QuantizerConfig):
    """Residual quantisation over scales, then over former frames, with one codebook for all."""

    type: str = "intra_inter"
    size: int = Field(ge=2)
    dim: int = Field(ge=1)
    grid: tuple[int, int]
    """Rows and columns of the map."""
    stages: int = Field(default=3, ge=1)
    """Scales: each has half the rows and columns of the next, rounded down; the last is the map's own."""
    history: int = Field(default=0, ge=0)
    """Former frames that `forward` takes; 0 for pictures."""
    beta: float = Field(default=1.0, ge=0)
    """Weight of the loss that moves the codes to the vectors; the one that moves the vectors has 1."""
    codebook: CodebookConfig = Field(default_factory=lambda: CodebookConfig(init="uniform"))


class IntraInterQuantizer(Quantizer):
    """One code per cell of every scale, then one per cell of the map for every former frame.

    A scale's codes are added to the result through its own 1 × 1 convolution, and taken from what is left without it. Former frames
    (maps before they were quantised, warped to the present one: `MapHistory`) are added to what is left, quantised, and only their codes
    taken away; these stages have no loss.
    """

    name = "intra_inter"
    Config = IntraInterQuantizerConfig
    config: IntraInterQuantizerConfig
    num_codes = 1

    def __init__(self, config: IntraInterQuantizerConfig):
        super().__init__(config)
        self.size, self.dim = config.size, config.dim
        rows, cols = config.grid
        halvings = [2 ** (config.stages - k - 1) for k in range(config.stages)]
        self.scale_grids = [(rows // by, cols // by) for by in halvings]
        if min(self.scale_grids[0]) < 1:
            raise ConfigError(f"intra_inter: a map of {rows}×{cols} cannot be halved {config.stages - 1} times")
        self.grids = self.scale_grids + [(rows, cols)] * config.history
        """Rows and columns of every stage, in the order of the codes."""
        self.num_positions = sum(rows * cols for rows, cols in self.grids)
        self.book = Codebook(config.codebook, config.size, config.dim)
        self.convolutions = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 1) for _ in self.grids)

    @property
    def scales(self) -> tuple[int, ...] | None:
        """Side of every stage's map, where the map is square."""
        return tuple(rows for rows, _ in self.grids) if self.config.grid[0] == self.config.grid[1] else None

    def forward(self, z: Tensor, history: Tensor | None = None) -> QuantizerOutput:
        """As every quantizer's. history ``(B, history, N, D)``: former frames, newest first; None: all zero, so that those stages refine
        what the scales left over. Raises `ConfigError` for other shapes."""
        z = check_input(z, self.dim)
        former = self._former(z, history)
        residual = self._map(z, self.config.grid)
        table, total = self.book.table(), torch.zeros_like(residual)
        codes, commitment, codebook = [], [], []
        for index, grid in enumerate(self.grids):
            scale = index < len(self.scale_grids)
            if scale:
                seen = self._resized(residual, grid)
            else:
                seen = residual + former[:, index - len(self.scale_grids)]
            flat = seen.flatten(2).transpose(1, 2)
            ids = nearest_codes(flat.flatten(0, 1), table).view(flat.shape[:2])
            vectors = F.embedding(ids, table)
            if self.training and torch.is_grad_enabled():
                self.book.observe(flat.detach().flatten(0, 1), ids.flatten())
            if scale:
                commitment.append((vectors.detach() - flat).square())
                codebook.append((vectors - flat.detach()).square())
            step = self._resized(self._map(straight_through(flat, vectors), grid), self.config.grid)
            total = total + self._convolved(index, step)
            residual = residual - step
            codes.append(ids)
        joined = torch.cat(codes, 1)[..., None]
        losses = {"commitment": _mean(commitment)}
        if self.config.codebook.learn != "ema":
            losses["codebook"] = self.config.beta * _mean(codebook)
        return QuantizerOutput(total.flatten(2).transpose(1, 2), joined, losses, batch_usage(joined, self.size))

    def _former(self, z: Tensor, history: Tensor | None) -> Tensor:
        wanted = (z.shape[0], self.config.history, *z.shape[1:])
        if history is None:
            history = z.new_zeros(wanted)
        elif tuple(history.shape) != wanted:
            raise ConfigError(f"intra_inter: history is {tuple(history.shape)}, expected (B, history, N, D) = {wanted}")
        return history.float().transpose(2, 3).unflatten(3, self.config.grid)

    def _map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if tokens.shape[1] != grid[0] * grid[1]:
            raise ConfigError(f"{tokens.shape[1]} positions are not a {grid[0]}×{grid[1]} map")
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _resized(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        if tuple(maps.shape[-2:]) == tuple(grid):
            return maps
        return F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False)

    def _convolved(self, index: int, maps: Tensor) -> Tensor:
        conv = self.convolutions[index]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        with nullcontext() if maps.is_meta else torch.autocast(maps.device.type, enabled=False):
            return F.conv2d(maps, conv.weight.float(), conv.bias.float())

    def split_stages(self, codes: Tensor) -> list[Tensor]:
        """Codes ``(B, N', 1)`` → one ``(B, rows * cols, 1)`` per stage. Raises `ConfigError` for another length."""
        if codes.shape[1] != self.num_positions:
            raise ConfigError(f"stages of {self.grids} have {self.num_positions} codes, got {codes.shape[1]}")
        return list(codes.split([rows * cols for rows, cols in self.grids], dim=1))

    def code_vectors(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return F.embedding(codes, self.book.table())

    def embed(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        table, total = self.book.table(), 0.0
        for index, (grid, part) in enumerate(zip(self.grids, self.split_stages(codes))):
            step = self._resized(self._map(F.embedding(part[..., 0], table), grid), self.config.grid)
            total = total + self._convolved(index, step)
        assert isinstance(total, Tensor)
        return total.flatten(2).transpose(1, 2)


def _mean(stages: list[Tensor]) -> Tensor:
    """Of every stage's mean; zero for an empty batch."""
    means = torch.stack([one.mean() if one.numel() else one.sum() for one in stages])
    return means.mean()
