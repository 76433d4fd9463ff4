"""How does one encoder come to see what several do? The stage kind ``agglomeration``, after AM-RADIO (arXiv 2312.06709).

For each teacher a head tells, from the student's cells, the teacher's features of the same picture. Teachers have their own published
weights and learn nothing; they and the heads are dropped afterwards: the student costs what one encoder does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import gcd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel, validate
from mllm.connectors.layers import resample, resampled_width
from mllm.encoders.base import VisionEncoder
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.processing.protocol import Processor
from mllm.recipe import StageSpec
from mllm.train.prepare import give_dtype
from mllm.train.stages.kind import StageKind
from mllm.train.stages.masked.stage import PictureReader
from mllm.train.stages.one_encoder import EncoderModel, check_one_encoder, encoder_to_train, train_one_encoder
from mllm.train.trainer import Run
from mllm.types import EncoderInfo, Grid

HEADS = "teacher_heads"


class AgglomerationOptions(StrictModel):
    """``options`` of an agglomeration stage."""

    teachers: dict[str, Any] = Field(min_length=1)
    """Name → encoder, written as under ``model.encoders``, with weights of its own."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Teacher → weight of its loss; default 1."""
    head_width: int = Field(default=512, gt=0)
    """Of the layer between the student's cells and what a head tells."""
    head_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the heads, which are new; default: the student's."""
    smooth_l1: float = Field(default=0.1, ge=0)
    """Share of the smooth L1 loss; the rest is the cosine's (AM-RADIO: 0.9 and 0.1)."""


class TeacherHead(nn.Module):
    """Student tokens ``(B, N, D)`` to one teacher's features, on the finest grid that divides both of theirs."""

    def __init__(self, student: EncoderInfo, teacher: EncoderInfo, inner: int):
        super().__init__()
        self.own, self.theirs, self.width = student.grid, teacher.grid, teacher.width
        self.grid: Grid = (gcd(student.grid[0], teacher.grid[0]), gcd(student.grid[1], teacher.grid[1]))
        width = resampled_width(student.width, student.grid, self.grid, "pixel_unshuffle")
        told = resampled_width(teacher.width, teacher.grid, self.grid, "pixel_unshuffle")
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.LayerNorm(inner), nn.Linear(inner, told)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, n, r, D')`` of the r cells that the teacher has where the common grid has one."""
        told = self.layers(resample(tokens, self.own, self.grid, "pixel_unshuffle"))
        return told.unflatten(2, (self.width, -1)).transpose(2, 3)

    def wanted(self, tokens: Tensor) -> Tensor:
        """The teacher's tokens ``(B, N', D')`` as `forward` tells them: each cell normalised, so that no teacher's scale counts."""
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        folded = resample(tokens, self.theirs, self.grid, "pixel_unshuffle")
        return folded.unflatten(2, (self.width, -1)).transpose(2, 3)


class AgglomerationModel(EncoderModel):
    """A student and a head for each teacher, as the trainer wants a model."""

    def __init__(
        self,
        name: str,
        encoder: VisionEncoder,
        teachers: Mapping[str, VisionEncoder],
        options: AgglomerationOptions,
        keys: Mapping[str, str],
    ):
        super().__init__("agglomeration", name, encoder, beside=HEADS, prefixes=("heads.",))
        self.options, self.keys = options, dict(keys)
        info = encoder.describe(encoder.config)
        dtype = next(p.dtype for p in encoder.parameters())
        self.heads = nn.ModuleDict(
            {n: TeacherHead(info, t.describe(t.config), options.head_width) for n, t in teachers.items()}
        ).to(dtype)
        self._teachers = dict(teachers)  # no children: they neither learn nor are saved

    @torch.no_grad()
    def seen_by(self, name: str, pixels: Tensor) -> Tensor:
        """A teacher's tokens of its pixels."""
        teacher = self._teachers[name].to(pixels.device).eval()
        return teacher(pixels.to(next(teacher.parameters()).dtype)).tokens

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over these pictures of the teachers' weighted losses, weighted by their share of ``num_items_in_batch``,
        all of the optimizer step."""
        pixels = inputs[self.keys[self.encoder_name]]
        tokens = self.encoder(pixels).tokens
        losses: dict[str, Tensor] = {}
        total = tokens.new_zeros((), dtype=torch.float32)
        for name, head in self.heads.items():
            assert isinstance(head, TeacherHead)
            told, wanted = head(tokens).float(), head.wanted(self.seen_by(name, inputs[self.keys[name]]))
            share = self.options.smooth_l1
            far = (1 - share) * (1 - F.cosine_similarity(told, wanted, dim=-1).mean())
            far = far + share * F.smooth_l1_loss(told, wanted)
            losses[f"agglomeration/{name}"] = far.detach()
            total = total + self.options.weights.get(name, 1.0) * far
        return SimpleNamespace(loss=total * (len(pixels) / float(num_items_in_batch)), losses=losses)


def check_agglomeration(stage: StageSpec) -> AgglomerationOptions:
    """The stage's options. Raises `ConfigError` for settings that an agglomeration stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(AgglomerationOptions, stage.options, where=f"{where}.options")
    check_one_encoder(stage, "an agglomeration", because="sees pictures only", lr="1.0e-3")
    if unknown := [name for name in options.weights if name not in options.teachers]:
        raise ConfigError(
            f"{where}.options.weights: there is no teacher {unknown[0]!r} (they are {', '.join(options.teachers)})"
        )
    for name, spec in options.teachers.items():
        if "." in name:
            raise ConfigError(f"{where}.options.teachers: {name!r}: a name without a dot")
        config = encoder_config(spec, where=f"{where}.options.teachers.{name}")
        if config.resolved_info.image.patch is not None:
            raise ConfigError(f"{where}.options.teachers.{name}: a teacher sees pictures of one size")
    return options


def build_agglomeration(
    stage: StageSpec, options: AgglomerationOptions, encoders: Mapping[str, VisionEncoder], processor: Processor
) -> tuple[AgglomerationModel, PictureReader]:
    """Raises `ConfigError` for a student that is not there or takes any size, and for a teacher of its name."""
    where, name = f"stages.{stage.name}", encoder_to_train(stage, encoders)
    info = encoders[name].describe(encoders[name].config)
    if info.image.patch is not None or info.leading or info.row_ends:
        raise ConfigError(f"{where}: encoder {name} has no grid of one size; a student sees pictures of one size")
    if name in options.teachers:
        raise ConfigError(f"{where}.options.teachers: {name!r} is the student; give the teacher another name")
    reader, teachers = PictureReader(processor, [name]), {}
    dtype = next(p.dtype for p in encoders[name].parameters())
    for teacher, spec in options.teachers.items():
        made = build_encoder(encoder_config(spec, where=f"{where}.options.teachers.{teacher}"))
        if getattr(made.config, "weights", None) is not None:
            made.load_pretrained()
        teachers[teacher] = made.requires_grad_(False).eval()
        give_dtype(made, dtype)
        reader.specs[teacher] = made.describe(made.config).image
        reader.keys[teacher] = f"teacher_{teacher}"
    return AgglomerationModel(name, encoders[name], teachers, options, reader.keys), reader


class AgglomerationStage(StageKind):
    """An encoder learns from others' features of pictures alone."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_agglomeration(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        options = check_agglomeration(stage)
        build = partial(build_agglomeration, stage, options)
        return train_one_encoder(run, stage, previous, folder, build, lr_beside=options.head_lr)
