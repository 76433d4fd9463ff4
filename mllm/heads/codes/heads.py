"""How do hidden states become the codes of an image, and codes the next inputs? One class per kind of head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadLoss, HeadModel, HeadParts, Reading, Step
from mllm.heads.codes.configs import (
    CodeHeadConfig,
    DepthHeadConfig,
    NextScaleHeadConfig,
    SeparateHeadConfig,
    VocabularyHeadConfig,
    check_weights,
)
from mllm.heads.codes.grammar import code_tokens, make_span, with_ids
from mllm.heads.codes.targets import DrawnImages, code_losses, lay_images
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.heads import DepthTransformer, DepthTransformerConfig, GenerationHead
from mllm.visual_tokenizers.next_scale import next_scale_inputs, split_scales
from mllm.visual_tokenizers.sequence import CodeBlock, code_blocks, single_vectors


class CodeHead(Head):
    """Base of the heads that draw: an image is the codes of the model's visual tokenizer, written between a start and an end token.

    Hidden states at the start token and at the placeholders, all but the last ones, predict the codes; the placeholders hold `slots`.
    """

    Config = CodeHeadConfig
    config: CodeHeadConfig
    targets = ("target_images",)
    draws = True
    num_slots: int
    """Placeholders of one image."""
    num_steps: int
    """Hidden states that predict: the start token's and those of the first ``num_steps - 1`` placeholders."""

    def __init__(self, config: CodeHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        tokenizer = parts.drawn_with(config.type)
        check_weights(config, tokenizer)
        self.blocks: list[CodeBlock] = code_blocks(tokenizer)
        self.num_codes: int = tokenizer.tokens_per_image

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        return {"type": cls.name}, HeadParts(32, tokenizer=tiny_tokenizer("vq"))

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        span = make_span(self.config, parts.drawn_with(self.config.type), self.num_slots)
        ids = torch.tensor([1, 2, *(token for token, count in span.runs for _ in range(count)), 3])
        ids = ids.expand(batch, -1).clone()
        sizes = torch.cat([torch.full((block.number,), block.size) for block in self.blocks])
        codes = torch.arange(batch)[:, None] * 3 + torch.arange(len(sizes))
        return Step(ids, ids.clone()), {"target_images": codes % sizes}

    @classmethod
    def tokens(cls, config: CodeHeadConfig, parts: HeadParts) -> list[str]:
        return code_tokens(config, parts.drawn_with(config.type))

    @classmethod
    def resolve(cls, config: CodeHeadConfig, parts: HeadParts, id_of: Callable[[str], int], *, null: int) -> Any:
        return with_ids(config, parts.drawn_with(config.type), id_of, null=null)

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> DrawnImages:
        return lay_images(model, targets["target_images"], step)

    def losses(self, model: HeadModel, step: Step, laid: DrawnImages, reading: Reading) -> HeadLoss:
        return code_losses(model, laid, reading.hidden, step.num_items)

    def _add_positions(self) -> None:
        """A learned vector per place, added to inputs from the start token on: which code comes next."""
        self.positions = nn.Parameter(torch.randn(self.num_slots + 1, self.width) * 0.02)

    def start(self, embedding: Tensor) -> Tensor:
        """What the start token's embedding ``(…, L)`` becomes."""
        return embedding + self.positions[0].to(embedding.dtype)

    def slots(self, codes: Tensor, tokenizer: VisualTokenizer) -> Tensor:
        """Packed codes ``(K, S)`` → inputs at the placeholders ``(K, num_slots, L)``."""
        raise NotImplementedError

    def logits(self, hidden: Tensor, codes: Tensor, tokenizer: VisualTokenizer) -> dict[tuple[str, int], Tensor]:
        """hidden ``(K, num_steps, L)`` and the true codes (for depth transformers) → (codebook, place of its first
        code) → logits ``(K, n, size)``."""
        raise NotImplementedError

    def code_losses(self, hidden: Tensor, codes: Tensor, tokenizer: VisualTokenizer) -> dict[str, Tensor]:
        """Codebook → cross-entropy ``(K, codes of the book)`` in fp32."""
        losses: dict[str, list[Tensor]] = {}
        for (book, start), logits in self.logits(hidden, codes, tokenizer).items():
            target = codes[:, start : start + logits.shape[1]]
            loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
            losses.setdefault(book, []).append(loss.view(target.shape))
        return {book: torch.cat(parts, 1) for book, parts in losses.items()}


def tiny_tokenizer(kind: str) -> Any:
    """The smallest sensible visual tokenizer of a kind."""
    return build_tokenizer({**VISUAL_TOKENIZERS.get(kind).tiny(), "type": kind})


def _aligner(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))


@HEADS.register("vocabulary")
class VocabularyHead(CodeHead):
    """Codes are ids of the language model's own vocabulary: it needs no weights, and its loss is the language model's."""

    Config = VocabularyHeadConfig
    config: VocabularyHeadConfig
    has_weights = False

    def __init__(self, config: VocabularyHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        self.num_slots = self.num_steps = self.num_codes


@HEADS.register("separate")
class SeparateHead(CodeHead):
    """One step per code, in the order of `code_blocks`."""

    Config = SeparateHeadConfig
    config: SeparateHeadConfig

    def __init__(self, config: SeparateHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        tokenizer, width = parts.drawn_with(config.type), parts.width
        self.num_slots = self.num_steps = self.num_codes
        books = tokenizer.codebooks
        self.heads = nn.ModuleDict(
            {name: GenerationHead(width, config.inner or width, size) for name, (size, _) in books.items()}
        )
        self.aligners = nn.ModuleDict({name: _aligner(tokenizer.embed_dims[name], width) for name in books})
        self._add_positions()
        if config.told_changes:
            self.changes = nn.Parameter(torch.randn(2, width) * 0.02)

    def told(self, changed: Tensor) -> Tensor:
        """Which codes ``(K, n)`` change → what is added ``(K, n, L)`` to the inputs before each, the start token's being the first."""
        return self.changes[changed.long()]

    def inputs(self, block: CodeBlock, ids: Tensor, place: int, tokenizer: VisualTokenizer) -> Tensor:
        """Inputs ``(K, n, L)`` for ids ``(K, n)`` of one block, whose first is code number ``place`` of the image."""
        aligner = self.aligners[block.book]
        vectors = single_vectors(tokenizer, block, ids).to(aligner[0].weight)  # pyright: ignore[reportIndexIssue]
        return aligner(vectors) + self.positions[place + 1 : place + 1 + ids.shape[1]]

    def slots(self, codes: Tensor, tokenizer: VisualTokenizer) -> Tensor:
        parts = [
            self.inputs(block, codes[:, block.start : block.start + block.number], block.start, tokenizer)
            for block in self.blocks
        ]
        return torch.cat(parts, 1)

    def logits(self, hidden: Tensor, codes: Tensor, tokenizer: VisualTokenizer) -> dict[tuple[str, int], Tensor]:
        return {(b.book, b.start): self.heads[b.book](hidden[:, b.start : b.start + b.number]) for b in self.blocks}


@HEADS.register("depth")
class DepthHead(CodeHead):
    """One step per position and grid: codebooks on the same grid are read together (side by side on channels) and
    written each by its own depth transformer from the same hidden state (DualToken, section 3.3 of its paper)."""

    Config = DepthHeadConfig
    config: DepthHeadConfig

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        return {"type": cls.name, "width": 16, "layers": 1, "heads": 2}, HeadParts(
            32, tokenizer=tiny_tokenizer("dualtoken")
        )

    def __init__(self, config: DepthHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        tokenizer, width = parts.drawn_with(config.type), parts.width
        if tokenizer.scales is not None:
            raise ConfigError("a depth head does not write multi-scale codes; use next_scale or separate")
        self.books, self.dims = dict(tokenizer.codebooks), dict(tokenizer.embed_dims)
        self.places = {name: min(b.start for b in self.blocks if b.book == name) for name in self.books}
        groups: dict[tuple[int, int], list[str]] = {}
        for name in self.books:
            groups.setdefault(tokenizer.grids[name], []).append(name)
        self.groups = [(rows * columns, names) for (rows, columns), names in groups.items()]
        self.num_slots = self.num_steps = sum(number for number, _ in self.groups)
        sizes = DepthTransformerConfig(
            width=config.width, layers=config.layers, heads=config.heads, dropout=config.dropout
        )
        self.heads = nn.ModuleDict(
            {
                name: DepthTransformer(sizes, hidden=width, code_dim=self.dims[name], size=size, depth=depth)
                for name, (size, depth) in self.books.items()
            }
        )
        self.aligners = nn.ModuleList(_aligner(sum(self.dims[n] for n in names), width) for _, names in self.groups)
        self._add_positions()

    def of_book(self, codes: Tensor, name: str) -> Tensor:
        """Packed codes ``(K, S)`` → one book's ``(K, N, Q)``."""
        depth = self.books[name][1]
        number = next(b.number for b in self.blocks if b.book == name)
        part = codes[:, self.places[name] : self.places[name] + number * depth]
        return part.unflatten(1, (depth, number)).transpose(1, 2)

    def inputs(self, group: int, codes: Mapping[str, Tensor], place: int, tokenizer: VisualTokenizer) -> Tensor:
        """Inputs ``(K, n, L)`` for codes ``(K, n, Q)`` by book of one group, whose first position is step ``place``."""
        aligner, names = self.aligners[group], self.groups[group][1]
        vectors = torch.cat([tokenizer.code_vectors(name, codes[name]).sum(2) for name in names], -1)
        number = vectors.shape[1]
        return aligner(vectors.to(aligner[0].weight)) + self.positions[place + 1 : place + 1 + number]  # pyright: ignore[reportIndexIssue]

    def slots(self, codes: Tensor, tokenizer: VisualTokenizer) -> Tensor:
        parts, place = [], 0
        for index, (number, names) in enumerate(self.groups):
            parts.append(self.inputs(index, {n: self.of_book(codes, n) for n in names}, place, tokenizer))
            place += number
        return torch.cat(parts, 1)

    def logits(self, hidden: Tensor, codes: Tensor, tokenizer: VisualTokenizer) -> dict[tuple[str, int], Tensor]:
        result, place = {}, 0
        for number, names in self.groups:
            states = hidden[:, place : place + number]
            for name in names:
                vectors = tokenizer.code_vectors(name, self.of_book(codes, name)).to(hidden.dtype)
                logits = self.heads[name](states, vectors)  # (K, N, Q, size)
                result[name, self.places[name]] = logits.transpose(1, 2).flatten(1, 2)
            place += number
        return result


@HEADS.register("next_scale")
class NextScaleHead(CodeHead):
    """One step per scale: its slots hold the picture so far, resized, and see one another; the first scale is a single
    code, predicted at the start token. Level and place have embeddings of their own (TokenFlow)."""

    Config = NextScaleHeadConfig
    config: NextScaleHeadConfig

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        return {"type": cls.name}, HeadParts(32, tokenizer=tiny_tokenizer("tokenflow"))

    def __init__(self, config: NextScaleHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        tokenizer, width = parts.drawn_with(config.type), parts.width
        if tokenizer.scales is None or tokenizer.scales[0] != 1 or len(tokenizer.codebooks) != 1:
            raise ConfigError(
                "a next_scale head needs a multi-scale tokenizer of one codebook whose first scale is 1; "
                f"{tokenizer.name} has scales {tokenizer.scales} and codebooks {list(tokenizer.codebooks)}"
            )
        ((self.book, (size, depth)),) = tokenizer.codebooks.items()
        if depth != 1:
            raise ConfigError(f"a next_scale head needs one code per position, {tokenizer.name} has {depth}")
        self.scales: tuple[int, ...] = tuple(tokenizer.scales)
        self.num_steps, self.num_slots = self.num_codes, self.num_codes - 1
        self.head = GenerationHead(width, config.inner or width, size)
        self.aligner = _aligner(tokenizer.embed_dims[self.book], width)
        self.levels = nn.Parameter(torch.randn(len(self.scales), width) * 0.02)
        self._add_positions()

    def vectors(self, ids: Tensor, tokenizer: VisualTokenizer) -> Tensor:
        """Ids ``(K, n)`` → ``(K, n, C)`` fp32."""
        return tokenizer.code_vectors(self.book, ids[..., None])[:, :, 0].float()

    def place(self, scale: int) -> int:
        """Number of the first code of scale number ``scale``."""
        return sum(s * s for s in self.scales[:scale])

    def inputs(self, pictures: Tensor, scale: int) -> Tensor:
        """The picture so far ``(K, s², C)`` → inputs ``(K, s², L)`` of scale number ``scale`` ≥ 1."""
        place = self.place(scale)
        added = self.levels[scale] + self.positions[place : place + pictures.shape[1]]
        return self.aligner(pictures.to(self.aligner[0].weight)) + added  # pyright: ignore[reportArgumentType, reportCallIssue]

    def slots(self, codes: Tensor, tokenizer: VisualTokenizer) -> Tensor:
        if len(self.scales) == 1:
            return self.positions.new_zeros(len(codes), 0, self.width)
        pictures = next_scale_inputs(codes, lambda ids: self.vectors(ids, tokenizer), self.scales)
        parts = split_scales(pictures, self.scales[1:])
        return torch.cat([self.inputs(part, index) for index, part in enumerate(parts, 1)], 1)

    def logits(self, hidden: Tensor, codes: Tensor, tokenizer: VisualTokenizer) -> dict[tuple[str, int], Tensor]:
        return {(self.book, 0): self.head(hidden)}
