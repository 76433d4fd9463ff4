"""How does one encoder learn to read text and still see pictures? The stage kind ``recognition``, UNIT's (arXiv 2409.04095).

A small language decoder writes what stands in a page (or says what a picture shows) from the encoder's tokens, and a small vision decoder
tells a frozen teacher's features of the same pixels, so that nothing is forgotten. Both are dropped afterwards: the encoder costs what it
did. Sizes are set by dataset, which makes UNIT's two stages two stages of a recipe: pictures small and pages large first, then swapped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mllm.config import StrictModel, validate
from mllm.encoders.base import VisionEncoder
from mllm.errors import ConfigError, DataError, did_you_mean
from mllm.models.vocabulary import num_token_ids
from mllm.processing.chat import IGNORE, EncodedSample
from mllm.processing.images import to_pixels_multi
from mllm.processing.protocol import Processor
from mllm.recipe import Recipe, StageSpec
from mllm.train.data import open_mixture
from mllm.train.stages.kind import StageKind
from mllm.train.stages.masked.stage import Decoder
from mllm.train.stages.one_encoder import EncoderModel, check_one_encoder, encoder_to_train, train_one_encoder
from mllm.train.stages.wrapped_processor import WrappedProcessor, one_picture
from mllm.train.trainer import Run
from mllm.types import Grid, ImageSpec, Sample

DECODERS = "decoders"
_TEXT, _GRID = "recognised_text", "recognised_grid"
Side = int | tuple[int, int]


class RecognitionOptions(StrictModel):
    """``options`` of a recognition stage."""

    size: Side = 224
    """Pixels, one side or (height, width), of every picture whose dataset is not named in ``sizes``; whole patches."""
    sizes: dict[str, Side] = Field(default_factory=dict)
    """Dataset → size."""
    downsample: int = Field(default=1, ge=1)
    """Rows and columns of tokens that the language decoder reads as one (long pages)."""
    decoder_width: int = Field(default=768, gt=0)
    decoder_depth: int = Field(default=4, ge=1)
    decoder_heads: int = Field(default=12, ge=1)
    text_weight: float = Field(default=1.0, ge=0)
    vision_weight: float = Field(default=1.0, ge=0)
    """Of what the vision decoder tells of the teacher's features; 0: nothing is told."""
    teacher: Literal["start", "published"] = "start"
    """Whose features: the encoder's as it was when the stage began, or with its published weights (``weights.source``), which in a
    second stage is the one that has not read yet (UNIT's)."""
    smooth_l1: float = Field(default=1.0, ge=0)
    """Weight of the smooth L1 loss beside the cosine's in it (the paper's mu)."""
    vision_depth: int = Field(default=2, ge=1)
    """Blocks of the vision decoder."""
    decoder_lr: float | None = Field(default=None, gt=0)
    """Learning rate of both decoders, which are new; default: the encoder's."""

    def size_of(self, dataset: str) -> Grid:
        """(height, width) in pixels."""
        size = self.sizes.get(dataset, self.size)
        return (size, size) if isinstance(size, int) else size


class TextReader(WrappedProcessor):
    """A processor whose samples are one picture, as patches of its dataset's size, and the text that the assistant says of it."""

    def __init__(self, processor: Processor, name: str, options: RecognitionOptions, max_length: int):
        super().__init__(processor)
        self.options, self.most = options, max_length
        self.spec: ImageSpec = processor.image_processor.specs[name]
        self.name, self.pixel_key = name, processor.pixel_keys[name]
        self.max_pixels = processor.image_processor.max_pixels

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """Raises `DataError` naming a sample without picture, or with more text than the stage's max_length."""
        where = f"sample {sample.id!r} of {sample.dataset}"
        if not sample.images:
            raise DataError(f"{where}: a recognition stage reads pictures, and there is none")
        said = next((turn.content for turn in sample.turns if turn.role == "assistant"), "")
        ids = self.tokenizer(said, add_special_tokens=False)["input_ids"] if said.strip() else []
        if ids:
            ids = [*ids, self.tokenizer.eos_token_id]
        if len(ids) > self.most:
            raise DataError(
                f"{where}: its text has {len(ids)} tokens, more than the stage's max_length {self.most}; raise that"
            )
        height, width = self.options.size_of(sample.dataset)
        spec = self.spec.model_copy(update={"height": height, "width": width})
        picture = one_picture(sample, "a recognition", max_pixels=self.max_pixels)
        pixels = to_pixels_multi(picture, {self.name: spec})[self.name]
        patch = spec.patch or 1
        grid = (height // patch, width // patch)
        patches = pixels.unflatten(2, (grid[1], patch)).unflatten(1, (grid[0], patch)).permute(1, 3, 0, 2, 4)
        # one learned position a picture, so the stage's loss is the mean over pictures
        result = EncodedSample(
            sample.id, sample.dataset, torch.zeros(2, dtype=torch.long), torch.tensor([IGNORE, 0]), num_images=1
        )
        result.pixels = {self.pixel_key: patches.reshape(grid[0] * grid[1], -1)}
        result.num_views = {self.pixel_key: grid[0] * grid[1]}
        result.extras = {_TEXT: torch.tensor([ids or [-1]]), _GRID: torch.tensor([grid])}
        return result


class LanguageDecoder(nn.Module):
    """Writes text after an encoder's tokens: a small causal language model, and the layer that makes tokens its first words."""

    def __init__(self, width: int, vocabulary: int, options: RecognitionOptions):
        super().__init__()
        inner = options.decoder_width
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.model = LlamaModel(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=inner,
                intermediate_size=4 * inner,
                num_hidden_layers=options.decoder_depth,
                num_attention_heads=options.decoder_heads,
                max_position_embeddings=2**16,
                initializer_range=inner
                ** -0.5,  # by width: with 0.02 the attention of a narrow decoder begins almost even
            )
        )
        self.head = nn.Linear(inner, vocabulary, bias=False)

    def forward(self, tokens: list[Tensor], texts: list[Tensor]) -> Tensor:
        """tokens ``(P, D)`` and ids ``(T,)`` of each page → ``(pages,)``: mean cross-entropy of each one's text."""
        rows, labels = [], []
        for page, ids in zip(tokens, texts, strict=True):
            words = self.model.embed_tokens(ids[:-1])
            rows.append(torch.cat([self.embed(page), words]))
            labels.append(torch.cat([ids.new_full((len(page) - 1,), IGNORE), ids]))
        length = max(map(len, rows))
        inputs = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=inputs.device)
        target = torch.stack([F.pad(row, (0, length - len(row)), value=IGNORE) for row in labels])
        hidden = self.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        pages, places = (target != IGNORE).nonzero(as_tuple=True)
        each = F.cross_entropy(self.head(hidden[pages, places]).float(), target[pages, places], reduction="none")
        counts = pages.bincount(minlength=len(rows))
        return each.new_zeros(len(rows)).index_add(0, pages, each) / counts

    @torch.no_grad()
    def write(self, page: Tensor, *, end: int, most: int) -> list[int]:
        """The likeliest ids after tokens ``(P, D)``, one by one, up to ``end`` or ``most`` of them."""
        row, found = self.embed(page)[None], []
        while len(found) < most:
            hidden = self.model(inputs_embeds=row, use_cache=False).last_hidden_state[:, -1]
            best = self.head(hidden).argmax(-1)
            if int(best) == end:
                break
            found.append(int(best))
            row = torch.cat([row, self.model.embed_tokens(best)[:, None]], dim=1)
        return found


class RecognitionModel(EncoderModel):
    """An encoder and its two decoders as the trainer wants a model."""

    def __init__(self, name: str, encoder: VisionEncoder, options: RecognitionOptions, pixel_key: str, vocabulary: int):
        super().__init__("recognition", name, encoder, beside=DECODERS, prefixes=("language.", "vision."))
        self.options, self.pixel_key = options, pixel_key
        width = encoder.describe(encoder.config).width
        dtype = next(p.dtype for p in encoder.parameters())
        self.language = LanguageDecoder(width, vocabulary, options).to(dtype)
        self.vision: Decoder | None = None
        self._teacher: list[VisionEncoder] = []  # no child: it neither learns nor is saved
        if options.vision_weight:
            self.vision = Decoder(width, options.decoder_width, width, options.vision_depth).to(dtype)
            self._teacher.append(_teacher(encoder, options.teacher))

    def pages(self, tokens: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        """Tokens ``(N, D)`` of each picture as the language decoder reads them."""
        step = self.options.downsample
        if step == 1:
            return tokens
        maps = [own.unflatten(0, grid).permute(2, 0, 1) for own, grid in zip(tokens, grids, strict=True)]
        return [F.avg_pool2d(one, step, ceil_mode=True).flatten(1).T for one in maps]

    def told(self, tokens: list[Tensor], patches: Tensor, grids: list[Grid]) -> Tensor:
        """``(B,)``: how far the vision decoder is from the teacher's features of each picture."""
        assert self.vision is not None
        with torch.no_grad():
            features = self._teacher[0].to(patches.device)(patches, grids=grids).tokens[0]
        taught = features.split([len(own) for own in tokens])
        losses: list[Tensor] = [features] * len(tokens)
        for grid in dict.fromkeys(grids):  # pictures of one size together
            members = [number for number, other in enumerate(grids) if other == grid]
            guess = self.vision(torch.stack([tokens[n] for n in members])).float()
            wanted = torch.stack([taught[n] for n in members]).float()
            far = 1 - F.cosine_similarity(guess, wanted, dim=-1).mean(1)
            far = far + self.options.smooth_l1 * F.smooth_l1_loss(guess, wanted, reduction="none").mean((1, 2))
            for number, one in zip(members, far, strict=True):
                losses[number] = one
        return torch.stack(losses)

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over these pictures, weighted by their share of ``num_items_in_batch``, all of the optimizer step."""
        options, patches = self.options, inputs[self.pixel_key]
        grids = [(int(rows), int(columns)) for rows, columns in inputs[_GRID].tolist()]
        texts = [ids[ids >= 0] for ids in inputs[_TEXT]]
        patches = patches.to(next(self.encoder.parameters()).dtype)
        joined = self.encoder(patches, grids=grids).tokens[0]
        tokens = list(joined.split([rows * columns for rows, columns in grids]))
        total, losses = joined.sum() * 0.0, {}
        read = [number for number, ids in enumerate(texts) if len(ids)]
        if read:
            pages = self.pages(tokens, grids)
            each = self.language([pages[n] for n in read], [texts[n] for n in read])
            total = total + options.text_weight * each.sum()
            losses["recognition/text"] = each.detach().mean()
        else:  # ranks reduce the same gradients
            total = total + 0.0 * sum(p.sum() for p in self.language.parameters() if p.requires_grad)
        if self.vision is not None:
            seen = self.told(tokens, patches, grids)
            total = total + options.vision_weight * seen.sum()
            losses["recognition/vision"] = seen.detach().mean()
        return SimpleNamespace(loss=total / float(num_items_in_batch), losses=losses)


def _teacher(encoder: VisionEncoder, kind: str) -> VisionEncoder:
    """A frozen copy, where ``published`` with the weights that it is published with."""
    made = copy.deepcopy(encoder).requires_grad_(False).eval()
    if kind == "published":
        made.load_pretrained()
    return made


def check_recognition(stage: StageSpec) -> RecognitionOptions:
    """The stage's options. Raises `ConfigError` for settings that a recognition stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(RecognitionOptions, stage.options, where=f"{where}.options")
    check_one_encoder(stage, "a recognition", because="has a decoder of its own", lr="1.0e-4")
    if options.decoder_width % (2 * options.decoder_heads):
        raise ConfigError(
            f"{where}.options.decoder_heads: {options.decoder_heads} heads of even width do not divide {options.decoder_width}"
        )
    return options


def check_sizes(stage: StageSpec, options: RecognitionOptions) -> None:
    """Raises `ConfigError` for a size of a dataset that the stage does not read: its pictures would have the other size, unsaid."""
    if not options.sizes:
        return
    known = [source.name for source in open_mixture(stage, 0).sources]
    for name in options.sizes:
        if name not in known:
            raise ConfigError(
                f"stages.{stage.name}.options.sizes: the stage has no dataset {name!r}{did_you_mean(name, known)} "
                f"(it has {', '.join(known)})"
            )


def build_recognition(
    stage: StageSpec, options: RecognitionOptions, encoders: Mapping[str, VisionEncoder], processor: Processor
) -> tuple[RecognitionModel, TextReader]:
    """Raises `ConfigError` for an encoder that is not there or takes one size only, and for sizes that are not whole patches."""
    where, name = f"stages.{stage.name}", encoder_to_train(stage, encoders)
    info = encoders[name].describe(encoders[name].config)
    if info.image.patch is None or info.leading or info.row_ends:
        raise ConfigError(
            f"{where}: encoder {name} takes pictures of one size; recognition needs one that takes any grid of patches, as unit and "
            "siglip2 do"
        )
    for dataset, size in {"size": options.size, **options.sizes}.items():
        if any(side < 1 or side % info.image.patch for side in ((size,) if isinstance(size, int) else size)):
            raise ConfigError(f"{where}.options: {dataset}: {size} is not whole patches of {info.image.patch} pixels")
    if (
        options.vision_weight
        and options.teacher == "published"
        and getattr(encoders[name].config, "weights", None) is None
    ):
        raise ConfigError(
            f"{where}.options.teacher: published needs model.encoders.{name}.weights, which this encoder has not; give them, or leave it "
            "at start"
        )
    reader = TextReader(processor, name, options, stage.max_length)
    vocabulary = num_token_ids(processor.tokenizer)
    return RecognitionModel(name, encoders[name], options, reader.pixel_key, vocabulary), reader


class RecognitionStage(StageKind):
    """An encoder learns to read, and keeps what it knew of pictures."""

    @classmethod
    def check(cls, stage: StageSpec, recipe: Recipe) -> None:
        super().check(stage, recipe)
        check_sizes(stage, check_recognition(stage))

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_recognition(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        options = check_recognition(stage)
        build = partial(build_recognition, stage, options)
        return train_one_encoder(run, stage, previous, folder, build, lr_beside=options.decoder_lr)
