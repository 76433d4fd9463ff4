"""In which order are the codes of one image written one after the other?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import VisualTokenizer


@dataclass(frozen=True)
class CodeBlock:
    """A run of codes in raster order: one codebook, one depth, one scale. ``start``: its first place in the sequence."""

    book: str
    depth: int
    rows: int
    columns: int
    start: int
    size: int
    """Codes in the book."""

    @property
    def number(self) -> int:
        return self.rows * self.columns

    @property
    def name(self) -> str:
        """The codebook's name, with depth and side where they tell blocks apart."""
        return f"{self.book}.{self.depth}.{self.rows}"


def code_blocks(tokenizer: VisualTokenizer) -> list[CodeBlock]:
    """Blocks of a tokenizer's codes in sequence order: codebook after codebook, in each depth after depth (a coarse
    picture first, then what refines it), in each scale after scale."""
    blocks, start = [], 0
    for book, (size, depth) in tokenizer.codebooks.items():
        grids = [(s, s) for s in tokenizer.scales] if tokenizer.scales is not None else [tokenizer.grids[book]]
        for level in range(depth):
            for rows, columns in grids:
                blocks.append(CodeBlock(book, level, rows, columns, start, size))
                start += rows * columns
    return blocks


def pack_codes(tokenizer: VisualTokenizer, codes: VisualCodes) -> Tensor:
    """Codes of B images → ``(B, S)`` int64 in the order of `code_blocks`; S is ``tokenizer.tokens_per_image``.

    Raises `ConfigError` where `VisualTokenizer.check_codes` does.
    """
    tokenizer.check_codes(codes)
    return torch.cat([codes.codes[book].transpose(1, 2).flatten(1) for book in tokenizer.codebooks], 1).long()


def unpack_codes(tokenizer: VisualTokenizer, packed: Tensor) -> VisualCodes:
    """``(B, S)`` → codes. Raises `AlignmentError` for another length (an image that was cut) and `ConfigError` for an
    id that is out of range."""
    total = tokenizer.tokens_per_image
    if packed.dim() != 2 or packed.shape[1] != total:
        raise AlignmentError(
            f"an image of this tokenizer ({tokenizer.name}) has {total} codes, got {tuple(packed.shape)[1:]}; "
            "codes of another tokenizer, or a sequence that was cut inside an image"
        )
    if packed.is_floating_point():
        raise ConfigError(f"codes are whole numbers, got {packed.dtype}")
    codes, start = {}, 0
    for book, (_, depth) in tokenizer.codebooks.items():
        number = tokenizer.num_positions[book]
        part = packed[:, start : start + number * depth].long()
        codes[book] = part.unflatten(1, (depth, number)).transpose(1, 2)
        start += number * depth
    result = VisualCodes(codes, tokenizer.grid, tokenizer.scales)
    tokenizer.check_codes(result)
    return result


def single_vectors(tokenizer: VisualTokenizer, block: CodeBlock, ids: Tensor) -> Tensor:
    """Ids ``(B, n)`` of one block → their own vectors ``(B, n, D)``."""
    repeated = ids[..., None].expand(*ids.shape, block.depth + 1)
    return tokenizer.code_vectors(block.book, repeated)[:, :, block.depth]
