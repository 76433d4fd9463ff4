"""How are the codes of one image written one after the other: packed, and as ids of a vocabulary?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor

from mllm.errors import AlignmentError, ConfigError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import VisualTokenizer, as_unit_range
from mllm.visual_tokenizers.painting import Painting


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


@torch.no_grad()
def decode_packed(
    tokenizer: VisualTokenizer, packed: Tensor, painting: Painting | None = None, seeds: Sequence[int] = ()
) -> Tensor:
    """Packed codes ``(B, S)`` → pixels ``(B, 3, H, W)`` in [0, 1]. painting: by which decoder; default: the tokenizer's own. seeds: of
    each picture's noise, where the decoder is a diffusion decoder. Raises `AlignmentError` for another length and `ConfigError` for ids
    out of range or settings that do not fit."""
    codes = unpack_codes(tokenizer, packed)
    if painting is None or not painting.by_diffusion(tokenizer):
        return as_unit_range(tokenizer.decode(codes))
    noise = [seed % 2**63 for seed in seeds]
    return as_unit_range(
        tokenizer.diffusion.decode(codes, steps=painting.steps, guidance=painting.guidance, seed=noise)
    )


def single_vectors(tokenizer: VisualTokenizer, block: CodeBlock, ids: Tensor) -> Tensor:
    """Ids ``(B, n)`` of one block → their own vectors ``(B, n, D)``."""
    repeated = ids[..., None].expand(*ids.shape, block.depth + 1)
    return tokenizer.code_vectors(block.book, repeated)[:, :, block.depth]


@dataclass(frozen=True)
class Level:
    """One codebook's block: ``start``, then ``rows`` × ``columns`` codes with ``end_of_line`` after each row, then
    ``end``. Code c is the id ``first + c``; there are ``size`` of them."""

    name: str
    start: int
    end: int
    first: int
    size: int
    rows: int
    columns: int


class ImageGrammar:
    """Start of image, the levels in order, end of image (ILLUME+, arXiv 2504.01934).

    The length is fixed by the levels, so what may come next follows from how far the start of the image lies back.
    """

    def __init__(self, levels: Sequence[Level], *, start_of_image: int, end_of_image: int, end_of_line: int):
        if not levels:
            raise ConfigError("an image grammar needs at least one level")
        self.levels = tuple(levels)
        self.start_of_image, self.end_of_image, self.end_of_line = start_of_image, end_of_image, end_of_line
        ranges: list[tuple[int, int]] = []
        for level in self.levels:
            ranges.append((level.start, level.start + 1))
            for _ in range(level.rows):
                ranges += [(level.first, level.first + level.size)] * level.columns
                ranges.append((end_of_line, end_of_line + 1))
            ranges.append((level.end, level.end + 1))
        ranges.append((end_of_image, end_of_image + 1))
        self.ranges = ranges
        """Allowed ids [low, high) at each place after the start of the image."""

    @property
    def length(self) -> int:
        """Tokens of one image, its start included."""
        return len(self.ranges) + 1

    def reserved(self) -> list[tuple[int, int]]:
        """Id ranges that only stand inside an image."""
        inside = [(level.first, level.first + level.size) for level in self.levels]
        single = [self.end_of_image, self.end_of_line, *(i for level in self.levels for i in (level.start, level.end))]
        return inside + [(i, i + 1) for i in single]

    def write(self, codes: Mapping[str, Tensor]) -> Tensor:
        """Codes of one image, level name → ``(rows · columns,)``, as ids ``(length,)``, start and end included."""
        parts = [torch.tensor([self.start_of_image])]
        for level in self.levels:
            grid = codes[level.name].reshape(-1)
            if grid.numel() != level.rows * level.columns:
                raise AlignmentError(
                    f"level {level.name!r} takes {level.rows}×{level.columns} codes, got {grid.numel()}"
                )
            if grid.numel() and (int(grid.min()) < 0 or int(grid.max()) >= level.size):
                raise ConfigError(f"level {level.name!r}: code ids must lie in 0 to {level.size - 1}")
            rows = grid.cpu().view(level.rows, level.columns) + level.first
            closed = torch.cat([rows, torch.full((level.rows, 1), self.end_of_line)], 1).flatten()
            parts += [torch.tensor([level.start]), closed, torch.tensor([level.end])]
        parts.append(torch.tensor([self.end_of_image]))
        return torch.cat(parts)

    def read(self, ids: Tensor) -> list[dict[str, Tensor]]:
        """All images in ids ``(T,)``, in order: level name → codes. Raises `AlignmentError` for an image that is
        cut off or breaks the grammar, with the position."""
        images = []
        for start in (ids == self.start_of_image).nonzero().flatten().tolist():
            body = ids[start + 1 : start + self.length]
            for place, token in enumerate(body.tolist()):
                low, high = self.ranges[place]
                if not low <= token < high:
                    raise AlignmentError(
                        f"position {start + 1 + place}: id {token} is not allowed there in an image "
                        f"(expected {low} to {high - 1})"
                    )
            if len(body) < len(self.ranges):
                raise AlignmentError(
                    f"the image at position {start} is cut off after {len(body)} of {len(self.ranges)} tokens; "
                    f"allow at least {self.length} new tokens per image"
                )
            images.append(self._codes(body))
        return images

    def _codes(self, body: Tensor) -> dict[str, Tensor]:
        codes, place = {}, 0
        for level in self.levels:
            number = level.rows * (level.columns + 1)
            rows = body[place + 1 : place + 1 + number].view(level.rows, level.columns + 1)[:, :-1]
            codes[level.name] = (rows - level.first).flatten()
            place += number + 2
        return codes


class NeverWritten(SuppressTokensLogitsProcessor):
    """Ids that no answer of a model holds. A class of its own: `generate` takes a caller's ``suppress_tokens`` for the same rule as one of
    transformers' class, and drops it."""


class ImageGrammarProcessor(LogitsProcessor):
    """Lets each sample of a batch emit only what the grammar allows at its own place; any batch size, no state
    between calls.

    Outside an image, ids that only stand inside one are forbidden. end_of_text: forced after the image (an
    image-only answer); None: text goes on. variants: (id, id) right before the start of the image → the grammar for
    that size (ILLUME+ writes height and width tokens there); others use ``grammar``.
    never: further ids that are not generated (placeholders).
    """

    def __init__(
        self,
        grammar: ImageGrammar,
        *,
        end_of_text: int | None = None,
        variants: Mapping[tuple[int, int], ImageGrammar] | None = None,
        never: Sequence[int] = (),
    ):
        self.start_of_image = grammar.start_of_image
        self.sizes = list((variants or {}).keys())
        grammars = [grammar, *(variants or {}).values()]
        if any(g.start_of_image != self.start_of_image for g in grammars):
            raise ConfigError("all variants of an image grammar share one start_of_image")
        longest = max(len(g.ranges) for g in grammars) + 1
        table = torch.zeros(len(grammars), longest, 2, dtype=torch.int64)
        self.lengths = torch.zeros(len(grammars), dtype=torch.int64)
        for row, g in enumerate(grammars):
            ranges = g.ranges if end_of_text is None else [*g.ranges, (end_of_text, end_of_text + 1)]
            table[row, : len(ranges)] = torch.tensor(ranges)
            self.lengths[row] = len(ranges)
        self.table = table
        self.outside = sorted({r for g in grammars for r in g.reserved()} | {(i, i + 1) for i in never})

    def _to(self, device: torch.device) -> None:
        if self.table.device != device:
            self.table, self.lengths = self.table.to(device), self.lengths.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids ``(B, T)``, scores ``(B, V)`` → scores with forbidden ids at -inf."""
        self._to(input_ids.device)
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        last = torch.where(input_ids == self.start_of_image, places, -1).amax(1)
        variant = torch.zeros_like(last)
        for row, (height, width) in enumerate(self.sizes, 1):
            before = [input_ids.gather(1, (last - back).clamp_min(0)[:, None])[:, 0] for back in (2, 1)]
            variant = torch.where((before[0] == height) & (before[1] == width) & (last >= 2), row, variant)
        since = length - 1 - last
        inside = (last >= 0) & (since < self.lengths[variant])
        low, high = self.table[variant, since.clamp(0, self.table.shape[1] - 1)].unbind(-1)
        ids = torch.arange(scores.shape[1], device=scores.device)
        forbidden = (ids < low[:, None]) | (ids >= high[:, None])
        outside = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        for first, end in self.outside:
            outside[first:end] = True
        return scores.masked_fill(torch.where(inside[:, None], forbidden, outside), -torch.inf)
