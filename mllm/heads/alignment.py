"""How do patches learn to mean something without a vision encoder? By what a teacher encoder sees in them (EVE, arXiv 2406.11832).

The language model's hidden states of a picture's tokens, of every few layers, are joined and compared with a frozen encoder's features
of the same picture, cell by cell. The head teaches while the model trains and does nothing else: answers, evaluation and serving never
run it, and the teacher is no part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.config import to_plain
from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadModel, HeadParts, Reading, Step
from mllm.types import EncoderInfo, Grid, ImageSpec, VisualLayout


class AlignmentHeadConfig(HeadConfig):
    """EVE's patch aligning layer; for ``views: {type: native}``."""

    type: Literal["alignment"] = "alignment"
    teacher: str | dict[str, Any]
    """An encoder by its name in the catalogue, ``{preset: name, …}``, or a whole config; its weights are read when training begins."""
    encoder: str | None = None
    """The model's encoder whose pixels the teacher's picture is made of; default: the first."""
    every: int = Field(default=4, ge=1)
    """Hidden states of the last layer and of every so many below it, the embeddings included, are read."""
    num_heads: int = Field(default=8, ge=1)
    weight: float = Field(default=1.0, ge=0)


@dataclass
class Lesson:
    """What a batch's pictures give the head: layouts: one a picture; patches ``(ΣN, 3 u²)``: the student's pixels."""

    layouts: Sequence[VisualLayout]
    patches: Tensor


@HEADS.register("alignment")
class AlignmentHead(Head):
    """Hidden states ``(K, L)`` of several layers → the teacher's features ``(K, D)``, under the authors' names."""

    Config = AlignmentHeadConfig
    config: AlignmentHeadConfig

    def __init__(self, config: AlignmentHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        self.encoder, self.student = _student(config, parts)
        self.layers = list(range(parts.layers, -1, -config.every))
        if len(self.layers) < 2:
            raise ConfigError(
                f"heads: alignment reads the last layer and others, and every: {config.every} leaves one of {parts.layers} layers; "
                "make every smaller"
            )
        self.teacher_config = _teacher_config(config.teacher)
        width = self.teacher_config.resolved_info.width
        if width % config.num_heads:
            raise ConfigError(
                f"heads: alignment.num_heads: {config.num_heads} do not divide the teacher's width {width}"
            )
        self.norm_layer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(parts.width), nn.Linear(parts.width, width, bias=False)) for _ in self.layers
        )
        self.input_layer = nn.Linear(parts.width, width)
        self.output_layer = nn.Linear(width, width)
        self._teacher: list[VisionEncoder] = []  # no child: it is not saved, and neither learns nor is counted

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        teacher = {
            "type": "unit",
            "width": 8,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
            "cpe_max_size": 12,
            "image_size": 12,
        }
        info = EncoderInfo(
            image=ImageSpec(height=12, width=12, patch=4), grid=(3, 3), width=6, leading=1, row_ends=True
        )
        return {"type": cls.name, "teacher": teacher, "every": 1, "num_heads": 2}, HeadParts(
            32, {"eye": info}, layers=2
        )

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        ids = torch.tensor([1, *[4] * (1 + 2 * 4), 5, 6]).repeat(
            batch, 1
        )  # 4: TinyModel's placeholder; 2 rows of 3 and an end
        pixels = {self.encoder: torch.randn(batch * 6, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))}
        return Step(ids, ids.clone(), inputs={"image_sizes": torch.tensor([[8, 12]] * batch)}, pixels=pixels), {}

    @classmethod
    def resolve(cls, config: AlignmentHeadConfig, parts: HeadParts, id_of: Callable[[str], int], *, null: int) -> Any:
        return config.model_copy(
            update={"teacher": to_plain(_teacher_config(config.teacher)), "encoder": _student(config, parts)[0]}
        )

    def teacher(self, like: Tensor) -> VisionEncoder:
        """The frozen teacher on the device and of the type of ``like``; built, and its weights read, when first asked for."""
        if not self._teacher:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # one without weights is at least the same after a restart
                found = build_encoder(self.teacher_config)
            if self.teacher_config.weights is not None:
                found.load_pretrained()
            self._teacher.append(found.requires_grad_(False).eval())
        return self._teacher[0].to(like.device, like.dtype)

    def load_pretrained(self) -> None:
        if self.teacher_config.weights is None:
            raise ConfigError(
                f"heads: alignment.teacher: a {self.teacher_config.type} without weights knows nothing to teach; name a preset, or "
                "give teacher.weights: {source: …}"
            )
        self.teacher(self.input_layer.weight)  # one that cannot be read is told before training begins

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> Lesson | None:
        if not self.training or step.input_ids is None:
            return None
        patches = step.pixels.get(self.encoder)
        if patches is None or not len(patches):
            if bool((step.input_ids == model.config.image_token_id).any()):
                raise ConfigError(
                    "heads: alignment compares pictures with a teacher's view of them, and this batch holds features without pixels; "
                    "set the stage's cache_features: false"
                )
            return None
        layouts = model.model.visual_layouts(step.inputs.get("image_sizes"))
        if layouts is None or any(layout.patches is None for layout in layouts):
            raise ConfigError("heads: alignment is for pictures seen as patches; set model.views: {type: native}")
        step.inputs["output_hidden_states"] = True
        return Lesson(layouts, patches)

    def losses(self, model: HeadModel, step: Step, laid: Lesson, reading: Reading) -> HeadLoss:
        assert step.input_ids is not None and reading.hidden_states is not None
        info = self.teacher_config.resolved_info
        shapes = [_shape(layout, info.grid) for layout in laid.layouts]
        seen = step.input_ids == model.config.image_token_id
        states = [_cells(reading.hidden_states[k][seen], laid.layouts, shapes) for k in self.layers]
        predicted = self(states)
        with torch.no_grad():
            grids = [_patch_grid(layout) for layout in laid.layouts]
            pictures = teacher_pictures(laid.patches, grids, shapes, self.student, info)
            features = self.teacher(predicted)(pictures.to(predicted)).tokens
            taught = [_inside(one.unflatten(0, info.grid), shape) for one, shape in zip(features, shapes, strict=True)]
        alike = F.cosine_similarity(predicted.float(), torch.cat(taught).float(), dim=-1)
        of_pictures = torch.stack([part.mean() for part in alike.split([rows * columns for rows, columns in shapes])])
        loss = 1 - of_pictures.mean()
        return HeadLoss(step.share() * self.config.weight * loss, {"alignment": loss.detach()})

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Hidden states ``(K, L)`` of the layers in `layers` → ``(K, D)``: the last layer's asks the others' of the same cell."""
        maps = torch.stack([norm(state) for norm, state in zip(self.norm_layer, states, strict=True)], dim=1)
        split = maps.unflatten(-1, (self.config.num_heads, -1))  # K, J, heads, D / heads
        query, others = split[:, :1], split[:, 1:]
        shares = (query * maps.shape[-1] ** -0.5 * others).sum(-1, keepdim=True).softmax(dim=1)
        return self.input_layer(states[0]) + self.output_layer((shares * others).sum(1).flatten(1))


def _student(config: AlignmentHeadConfig, parts: HeadParts) -> tuple[str, ImageSpec]:
    """Name of the encoder whose pixels are read, and what they are. Raises `ConfigError` where there is none of patches."""
    name = config.encoder or next(iter(parts.encoders), None)
    if name is None or name not in parts.encoders:
        known = ", ".join(parts.encoders) or "none"
        raise ConfigError(f"heads: alignment.encoder: {name!r} is no encoder of this model; its encoders: {known}")
    image = parts.encoders[name].image
    if image.patch is None:
        raise ConfigError(
            f"heads: alignment.encoder: {name!r} takes whole pictures, not patches (views native); alignment is for eve, patch_conv "
            "and encoders of native resolution"
        )
    return name, image


def _teacher_config(teacher: str | Mapping[str, Any]) -> EncoderConfig:
    """Raises `ConfigError` for an encoder that is none, or whose tokens are no map of the picture."""
    config = encoder_config(teacher, where="heads: alignment.teacher")
    info = config.resolved_info
    if info.leading or info.row_ends or not info.in_place:
        raise ConfigError(
            f"heads: alignment.teacher: {config.type} gives no map of the picture, cell by cell; choose a ViT"
        )
    return config


def _patch_grid(layout: VisualLayout) -> Grid:
    assert layout.patches is not None
    return layout.patches


def _map_size(layout: VisualLayout) -> Grid:
    """Rows and columns of a picture's tokens in the sequence."""
    maps = [block for block in layout.blocks if not block.ids]
    return sum(block.grid[1] for block in maps), maps[0].grid[2]


def _shape(layout: VisualLayout, most: Grid) -> Grid:
    """Rows and columns in which student and teacher meet: the student's, pooled by a whole number to fit the teacher's grid."""
    rows, columns = _map_size(layout)
    if not rows or not columns:
        raise ConfigError(
            "heads: alignment needs visual tokens that are a map of the picture; use connector mlp or pixel_shuffle"
        )
    ratio = max(math.ceil(rows / most[0]), math.ceil(columns / most[1]))
    return math.ceil(rows / ratio), math.ceil(columns / ratio)


def _cells(tokens: Tensor, layouts: Sequence[VisualLayout], shapes: Sequence[Grid]) -> Tensor:
    """Tokens ``(ΣM, L)`` of pictures → those of their maps ``(ΣK, L)``, without leading ones and row ends, pooled to ``shapes``."""
    found = []
    for part, layout, shape in zip(
        tokens.split([layout.num_placeholders for layout in layouts]), layouts, shapes, strict=True
    ):
        blocks = [block for block in layout.blocks if not block.ids]
        rows = [
            lines[block.leading :].unflatten(0, (block.grid[1], -1))[:, : block.grid[2]]
            for block, lines in zip(blocks, part.split([block.num_tokens for block in blocks]), strict=True)
        ]
        cells = torch.cat(rows)  # rows, columns, L
        if tuple(cells.shape[:2]) != shape:
            cells = F.adaptive_avg_pool2d(cells.permute(2, 0, 1), shape).permute(1, 2, 0)
        found.append(cells.flatten(0, 1))
    return torch.cat(found)


def _inside(cells: Tensor, shape: Grid) -> Tensor:
    """Of the teacher's map ``(rows, columns, D)``, the middle ``shape`` in which the picture lies → ``(K, D)``."""
    top, left = ((most - own) // 2 for most, own in zip(cells.shape[:2], shape))
    return cells[top : top + shape[0], left : left + shape[1]].flatten(0, 1)


def teacher_pictures(
    patches: Tensor, grids: Sequence[Grid], shapes: Sequence[Grid], student: ImageSpec, teacher: EncoderInfo
) -> Tensor:
    """The student's pictures as the teacher takes them: resized so that one of its cells lies on each of the student's, in the middle of
    a canvas of the mean colour.

    Args:
        patches: ``(ΣN, 3 u²)``, squares of pictures with these ``grids``, row after row.
        grids: (rows, columns) of patches, picture by picture.
        shapes: (rows, columns) of the teacher's cells that each picture fills.
        student: how the patches were normalised, and their side u.
        teacher: its sizes.

    Returns:
        ``(B, 3, H, W)`` float32, in the teacher's normalisation.
    """
    unit = student.patch or 1
    cell = (teacher.image.height // teacher.grid[0], teacher.image.width // teacher.grid[1])
    told, own = (_colours(spec, patches) for spec in (student, teacher.image))
    canvas = patches.new_zeros(len(grids), 3, teacher.image.height, teacher.image.width, dtype=torch.float32)
    for number, (part, grid, shape) in enumerate(
        zip(patches.split([rows * columns for rows, columns in grids]), grids, shapes, strict=True)
    ):
        squares = part.float().view(*grid, 3, unit, unit).permute(2, 0, 3, 1, 4)
        picture = squares.reshape(1, 3, grid[0] * unit, grid[1] * unit) * told[1] + told[0]
        size = (shape[0] * cell[0], shape[1] * cell[1])
        picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((most - wanted) // 2 * side for most, wanted, side in zip(teacher.grid, shape, cell))
        canvas[number, :, top : top + size[0], left : left + size[1]] = ((picture - own[0]) / own[1])[0]
    return canvas


def _colours(spec: ImageSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(1, 3, 1, 1)``."""
    mean, std = (torch.tensor(value, device=like.device).view(1, 3, 1, 1) for value in (spec.mean, spec.std))
    return mean, std
