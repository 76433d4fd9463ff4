"""How does an encoder learn from pictures that nobody described? The stage kind ``masked``.

Two views of a picture hide disjoint cells; the encoder tells what is hidden, and a second branch what is visible (DMJD). It works on any
encoder with a grid: a hidden cell has the mean colour in the pixels. The tuned encoder goes back into the model, and the next stage of the
recipe trains on with it; the branches that predict are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel, validate
from mllm.encoders.backbones.layers import Block
from mllm.encoders.base import VisionEncoder
from mllm.errors import ConfigError, DataError
from mllm.processing.chat import IGNORE, EncodedSample
from mllm.processing.images import load_image, to_pixels_multi
from mllm.processing.protocol import Processor
from mllm.recipe import Recipe, StageSpec
from mllm.train.stages.kind import StageKind
from mllm.train.stages.masked.targets import BINS, LossPair, Target, disjoint_masks, hide, joint_loss, target_of
from mllm.train.stages.one_encoder import EncoderModel, check_one_encoder, encoder_to_train, train_one_encoder
from mllm.train.stages.wrapped_processor import WrappedProcessor
from mllm.train.trainer import Run
from mllm.types import Sample

BRANCHES = "mask_branches"
_SLICE = "slice_numbers"


class MaskedOptions(StrictModel):
    """``options`` of a masked stage."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of cells that each of the two views hides."""
    predict_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share that the two hide together; DMJD's disjoint masks make it larger than ``mask_ratio``."""
    block: int = Field(default=1, ge=1)
    """Rows and columns of cells that are hidden together."""
    target: Target = "hog"
    """hog (DMJD), pixels, gradients, pixels_gradients (Uni4Eye), or teacher: another encoder's frozen features."""
    teacher: str | None = None
    """Name of that encoder in the model; it sees the whole picture and has the same grid."""
    losses: LossPair = "l2_smooth"
    """Of hidden and of visible cells: squares and smooth L1, or the other way round."""
    visible_weight: float = Field(default=1.0, ge=0)
    """Weight of the visible cells' loss; 0: only hidden cells are told."""
    branch_width: int = Field(default=512, gt=0)
    decoder_depth: int = Field(default=0, ge=0)
    """Transformer blocks of the branch that tells hidden cells (DMJD has 2 or 8); 0: a layer of its own only. Target
    ``pixels_gradients`` has two such branches, one for the picture and one for its gradient map."""
    branch_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the branches, which are new; default: the encoder's."""


class PictureReader(WrappedProcessor):
    """A processor whose samples are one picture, for the encoder and its teacher; with ``volumes`` several are the slices of one."""

    def __init__(self, processor: Processor, names: list[str], *, volumes: bool = False):
        super().__init__(processor)
        self.volumes = volumes
        images = processor.image_processor
        self.specs = {name: images.specs[name] for name in names}
        self.keys = {name: processor.pixel_keys[name] for name in names}
        self.max_pixels = images.max_pixels

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """Raises `DataError` naming a sample without picture, or with several that are no volume."""
        where = f"sample {sample.id!r} of {sample.dataset}"
        if not sample.images:
            raise DataError(f"{where}: a masked stage learns from pictures, and there is none")
        count = len(sample.images)
        if count > 1 and not self.volumes:
            raise DataError(
                f"{where}: {count} pictures, and a masked stage learns from one a row; write a row for each (only an encoder of volumes, "
                "such as uni4eye, reads several as slices)"
            )
        pictures = [load_image(image, where=where, max_pixels=self.max_pixels) for image in sample.images]
        pixels = [to_pixels_multi(picture, self.specs) for picture in pictures]
        counted = torch.zeros(1 + count, dtype=torch.long)
        labels = torch.tensor([IGNORE, *[0] * count])  # one a picture, so the stage's loss is the mean over pictures
        result = EncodedSample(sample.id, sample.dataset, counted, labels, num_images=count)
        result.pixels = {self.keys[name]: torch.stack([each[name] for each in pixels]) for name in self.specs}
        if self.volumes:
            result.extras = {_SLICE: torch.arange(count)}
        return result


def _branch(width: int, inner: int, out: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for k in range(layers):
        parts += [nn.Linear(width if k == 0 else inner, inner), nn.LayerNorm(inner), nn.GELU()]
    return nn.Sequential(*parts, nn.Linear(inner, out))


class Decoder(nn.Module):
    """Tokens ``(B, N, D)`` of all cells, which see each other, to what is told of each."""

    def __init__(self, width: int, inner: int, out: int, depth: int):
        super().__init__()
        heads = next(h for h in range(max(inner // 64, 1), 0, -1) if inner % h == 0)
        self.embed = nn.Linear(width, inner)
        self.blocks = nn.ModuleList(Block(inner, heads, 4.0) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(inner), nn.Linear(inner, out)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class MaskedModel(EncoderModel):
    """An encoder and its two branches as the trainer wants a model."""

    def __init__(
        self, name: str, encoder: VisionEncoder, options: MaskedOptions, keys: dict[str, str], teacher: Any = None
    ):
        super().__init__("masked", name, encoder, beside=BRANCHES, prefixes=("hidden_branch.", "visible_branch."))
        self.options, self.keys = options, keys
        self._teacher = [teacher]  # no child: it neither learns nor is counted
        info = encoder.describe(encoder.config)
        self.grid = info.grid
        self.depth = encoder.volume_depth or 1
        told, inner = [self.depth * width for width in self._target_widths(info)], options.branch_width
        self.hidden_branch = nn.ModuleList(
            Decoder(info.width, inner, out, options.decoder_depth)
            if options.decoder_depth
            else _branch(info.width, inner, out, 1)
            for out in told
        )
        self.visible_branch = _branch(info.width, inner, sum(told), 3)
        dtype = next(p.dtype for p in encoder.parameters())
        self.hidden_branch.to(dtype)
        self.visible_branch.to(dtype)

    def _target_widths(self, info: Any) -> list[int]:
        """Of every part of the target, in its order."""
        kind = self.options.target
        if kind == "teacher":
            teacher = self._teacher[0]
            return [teacher.describe(teacher.config).width]
        area = (info.image.height // info.grid[0]) * (info.image.width // info.grid[1])
        return {"hog": [3 * BINS], "pixels": [3 * area], "gradients": [area], "pixels_gradients": [3 * area, area]}[
            kind
        ]

    @torch.no_grad()
    def target(self, inputs: dict[str, Any]) -> Tensor:
        """``(B, N, D)`` float32: what the cells of whole pictures are."""
        if self.options.target != "teacher":
            return target_of(inputs[self.keys[self.encoder_name]], self.grid, self.options.target)
        teacher, name = self._teacher[0], self.options.teacher
        pixels = inputs[self.keys[str(name)]]
        teacher.to(pixels.device).eval()
        tokens = teacher(pixels).tokens.float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    @staticmethod
    def _scenes(numbers: Tensor | None) -> dict[str, Tensor]:
        """What an encoder of volumes is told: which slices of both views belong together, by their numbers ``(S,)`` in their volumes."""
        if numbers is None:
            return {}
        volumes = (numbers == 0).cumsum(0) - 1
        return {"scene_ids": torch.cat([volumes, volumes + volumes[-1] + 1])}

    def _own(self, told: Tensor, numbers: Tensor | None) -> Tensor:
        """Of what a token ``(2 S, N, depth · D)`` tells of all slices that it holds, the part of the slice itself: ``(2 S, N, D)``."""
        if numbers is None or self.depth == 1:
            return told
        parts = told.unflatten(2, (self.depth, -1))
        return parts[torch.arange(len(told), device=told.device), :, (numbers % self.depth).repeat(2)]

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over these pictures, weighted by their share of ``num_items_in_batch``, all of the optimizer step. Of
        volumes every slice counts as a picture; the cells of the slices that one token holds are hidden together."""
        options = self.options
        pixels = inputs[self.keys[self.encoder_name]]
        numbers = inputs.get(_SLICE)
        patches = torch.arange(len(pixels)) if numbers is None else (numbers % self.depth == 0).cumsum(0).cpu() - 1
        masks = disjoint_masks(
            int(patches[-1]) + 1, self.grid, options.mask_ratio, options.predict_ratio, options.block
        )
        mask = torch.cat([each[patches] for each in masks]).to(pixels.device)
        shown = hide(torch.cat([pixels, pixels]), mask, self.grid)
        tokens = self.encoder(shown, **self._scenes(numbers)).tokens
        seen = tokens[~mask].view(len(mask), -1, tokens.shape[2])
        predicted = torch.cat([self._own(branch(tokens), numbers) for branch in self.hidden_branch], dim=2).float()
        seen = self._own(self.visible_branch(seen), numbers).float()
        hidden, visible = joint_loss(
            predicted, seen, self.target(inputs), mask, pair=options.losses, weight=options.visible_weight
        )
        share = len(pixels) / float(num_items_in_batch)
        losses = {"masked/hidden": hidden.detach(), "masked/visible": visible.detach()}
        return SimpleNamespace(loss=(hidden + visible) * share, losses=losses)


def check_masked(stage: StageSpec, recipe: Recipe | None = None) -> MaskedOptions:
    """The stage's options. Raises `ConfigError` for settings that a masked stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(MaskedOptions, stage.options, where=f"{where}.options")
    check_one_encoder(stage, "a masked", because="sees pictures only", lr="1.5e-4")
    if options.predict_ratio < options.mask_ratio:
        raise ConfigError(
            f"{where}.options.predict_ratio: {options.predict_ratio:g} is less than one view hides ({options.mask_ratio:g})"
        )
    if (options.target == "teacher") != (options.teacher is not None):
        raise ConfigError(
            f"{where}.options.teacher: target teacher and the name of an encoder of the model go together"
        )
    return options


def build_masked(
    stage: StageSpec, options: MaskedOptions, encoders: Mapping[str, VisionEncoder], processor: Processor
) -> tuple[MaskedModel, PictureReader]:
    """Raises `ConfigError` for an encoder that is not there, or whose grid cannot be masked."""
    where, name = f"stages.{stage.name}", encoder_to_train(stage, encoders)
    info = encoders[name].describe(encoders[name].config)
    (rows, columns), image = info.grid, info.image
    if image.panels > 1:
        raise ConfigError(
            f"{where}: encoder {name} sees pictures of {image.panels} panels, whose cells cannot be hidden yet"
        )
    if rows < 2 or columns < 2 or image.height % rows or image.width % columns:
        raise ConfigError(
            f"{where}: encoder {name} has a grid of {rows} x {columns} on {image.height} x {image.width} pixels; cells that are hidden "
            "need a grid that divides the picture"
        )
    if rows % options.block or columns % options.block:
        raise ConfigError(
            f"{where}.options.block: {options.block} does not divide the grid {rows} x {columns} of {name}"
        )
    teacher = None
    if options.teacher is not None:
        if options.teacher not in encoders or options.teacher == name:
            others = ", ".join(n for n in encoders if n != name) or "none"
            raise ConfigError(
                f"{where}.options.teacher: {options.teacher!r} is no other encoder of the model ({others})"
            )
        teacher = encoders[options.teacher]
        grid = teacher.describe(teacher.config).grid
        if grid != info.grid:
            raise ConfigError(
                f"{where}.options.teacher: its grid is {grid}, that of {name} {info.grid}; choose its image_size"
            )
    names = [n for n in (name, options.teacher) if n is not None]
    reader = PictureReader(processor, names, volumes=encoders[name].volume_depth is not None)
    return MaskedModel(name, encoders[name], options, reader.keys, teacher), reader


class MaskedStage(StageKind):
    """An encoder learns from pictures alone."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_masked(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        options = check_masked(stage)
        build = partial(build_masked, stage, options)
        return train_one_encoder(run, stage, previous, folder, build, lr_beside=options.branch_lr)
