"""What geometry do several views of one scene show, in a plain DINOv2? The backbone of Depth Anything 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.encoders.multiview import ViewsConfig, ViewsEncoder
from mllm.encoders.view_blocks import (
    Block,
    PatchConv,
    Rotation,
    ViewsModel,
    across_views,
    resized_positions,
    rotary_table,
    token_places,
)
from mllm.encoders.weights import load_exactly
from mllm.errors import CheckpointError
from mllm.types import Grid, ImageSpec

_CAMERAS = "cam_enc."
"""Below which the published model has its camera encoder."""
_POSE_SIZE = 9
"""Numbers of a known camera (`mllm.processing.known_cameras`), in the first cells of the fourth channel."""
_CAMERA_HEADS, _CAMERA_BLOCKS = 16, 4
"""Of the published camera encoder, whatever its width."""


class DepthAnything3Config(ViewsConfig):
    """Depth Anything 3 (arXiv 2511.10647); defaults are DA3-BASE's backbone."""

    width: int = Field(default=768, gt=0)
    """C. One layer's features have 2 C channels: after the last block inside each view, then after the last of all, normalised."""
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    gated: bool = False
    """Feed-forward layers are gated (SwiGLU), as in DA3-GIANT."""
    across_from: int | None = Field(default=4, ge=1)
    """Blocks before the first from which every second one lets a scene's views see each other (8 in DA3-LARGE). From there on positions
    turn queries and keys, and a camera token takes the class token's place. null: each picture is seen alone, as by DA3MONO and
    DA3METRIC, and features have C channels."""
    position_size: int = Field(default=518, gt=0)
    """Image size of the position table, which is resized on use (bicubic)."""
    reference: Literal["balanced", "first", "middle"] = "balanced"
    """Which view the others are seen from, of three or more (of two the first): the one whose class token lies nearest to the middle of
    all by likeness, length and spread, as published; or by place."""
    known: list[Literal["cameras"]] = []
    """What is told of a video's frames beside their pictures: where their cameras stand and what lens they have, read by the published
    camera encoder. The frames of a scene whose cameras are all known then have no reference view."""
    missing: Literal["refuse", "unknown"] = "refuse"
    """A picture or video whose cameras nothing tells. unknown: it is seen as without known."""

    def image(self, default: ImageSpec) -> ImageSpec:
        image = super().image(default)
        return image.model_copy(update={"cameras": self.missing}) if self.known else image

    @model_validator(mode="after")
    def _cameras_of_several(self) -> DepthAnything3Config:
        if self.known and self.across_from is None:
            raise ValueError("known: models of single pictures (across_from: null) have no camera token; remove known")
        if self.known and self.width % _CAMERA_HEADS:
            raise ValueError(
                f"known: the camera encoder has {_CAMERA_HEADS} heads, which do not divide width {self.width}"
            )
        if self.missing != "refuse" and not self.known:
            raise ValueError("missing: nothing is known of frames here; add known: [cameras] or remove missing")
        return self

    @model_validator(mode="after")
    def _one_reference(self) -> DepthAnything3Config:
        if self.chunk is not None and self.reference != "first":
            raise ValueError(
                f"chunk: the parts of a scene share its first view, so the reference cannot be {self.reference!r}; add reference: first"
            )
        return self


class PoseMlp(nn.Module):
    """A pose's numbers → C channels."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(_POSE_SIZE, width // 2), nn.Linear(width // 2, width)

    def forward(self, poses: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(poses)))


class CameraEncoder(nn.Module):
    """Known cameras ``(S, 9)`` of a scene (`mllm.processing.known_cameras`) → the camera tokens ``(S, C)`` of its views, which see each
    other. Names as published."""

    def __init__(self, width: int):
        super().__init__()
        self.trunk = nn.ModuleList(
            Block(width, _CAMERA_HEADS, qk_norm=False, scale=0.01, eps=1e-5) for _ in range(_CAMERA_BLOCKS)
        )
        self.token_norm, self.trunk_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pose_branch = PoseMlp(width)

    def forward(self, cameras: Tensor) -> Tensor:
        with torch.autocast("cpu" if cameras.is_meta else cameras.device.type, enabled=False):
            x = self.token_norm(self.pose_branch(cameras.to(self.token_norm.weight.dtype)))[None]
            for block in self.trunk:
                x = block(x)
            return self.trunk_norm(x)[0]


class AlternatingViT(ViewsModel):
    """DINOv2 whose later blocks attend inside each view and across the views of a scene in turns."""

    def __init__(self, config: DepthAnything3Config, depth: int):
        super().__init__()
        width, self.side = config.width, config.position_size // config.patch_size
        self.across_from, self.patch_size, self.reference = config.across_from, config.patch_size, config.reference
        self.head_dim = width // config.num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if self.across_from is not None:
            self.camera_token = nn.Parameter(torch.randn(1, 2, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.side**2, width) * 0.02)
        self.patch_embed = PatchConv(width, config.patch_size)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, qk_norm=self.joins(number), scale=1.0, eps=1e-6, gated=config.gated)
            for number in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.cam_enc = CameraEncoder(width) if config.known else None

    def joins(self, number: int) -> bool:
        """Whether a block is one of those from which on views see each other."""
        return self.across_from is not None and number >= self.across_from

    def rotations(self, grid: Grid, x: Tensor) -> tuple[Rotation, Rotation]:
        """How the tokens of a view are turned inside it, by row and column from 1, and across views, where all its patches have one
        place: (0, 0) is the camera token's."""
        places = token_places(grid, 1, x.device)
        inside = rotary_table(places, self.head_dim, x.dtype)
        return inside, rotary_table(places.clamp(max=1), self.head_dim, x.dtype)

    def forward(
        self, pixels: Tensor, views: Sequence[int], wanted: Sequence[int], cameras: Tensor | None = None
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """pixels ``(B, 3, H, W)``, ImageNet-normalised, the views of a scene side by side; views: how many each scene has, in order;
        wanted: layer counts; cameras: ``(B, 9)``, NaN in all views of a scene whose cameras are not known → ``{count: (tokens (B, 1 + N,
        C), those after the last block inside the views)}``, the second None where views never meet."""
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), self.patch_embed(pixels)], dim=1)
        x = x + resized_positions(self.pos_embed, self.side, grid, antialias=False)
        inside, across = self.rotations(grid, x)
        alone, later, outputs = x, None, {}
        for number, block in enumerate(self.blocks):
            if self.across_from is not None and number == self.across_from - 1:
                later = self.later_views(x, views)
            if number == self.across_from:
                assert later is not None
                token = self.camera_tokens(later, views, cameras)
                x = torch.cat([token[:, None], x[:, 1:]], dim=1)
            joined = self.joins(number)
            if joined and number % 2:
                x = across_views(self.run, block, x, views, across)
            else:
                x = alone = self.run(block, x, inside if joined else None)
            if number + 1 in wanted:
                outputs[number + 1] = (x, None if self.across_from is None else alone)
        return outputs

    def camera_tokens(self, later: Tensor, views: Sequence[int], cameras: Tensor | None) -> Tensor:
        """``(B, C)``: one of two by whether a view is a reference, and of scenes with known cameras what these say. Both are always
        computed, so that processes with and without known cameras reduce the same gradients."""
        tokens = self.camera_token[0][later]
        if cameras is None or self.cam_enc is None:
            return tokens
        parts = []
        for own, told in zip(tokens.split(list(views)), cameras.split(list(views)), strict=True):
            known = told.isfinite().all()
            parts.append(torch.where(known, self.cam_enc(torch.where(known, told, 0.0)), own))
        return torch.cat(parts)

    def later_views(self, x: Tensor, views: Sequence[int]) -> Tensor:
        """0 for each scene's reference, 1 for its other views: ``(B,)``, by the class tokens of ``x``."""
        found = torch.ones(len(x), dtype=torch.long, device=x.device)
        begin = 0
        for count in views:
            place: int | Tensor = 0
            if count > 2 and self.reference != "first":
                place = count // 2 if self.reference == "middle" else balanced(x[begin : begin + count, 0])
            found[begin + place] = 0
            begin += count
        return found


def balanced(tokens: Tensor) -> Tensor:
    """Which of three or more class tokens ``(S, C)`` lies nearest to the middle of the range of all by its mean likeness to the others,
    its length and its spread; the first of equals."""
    lengths = tokens.norm(dim=-1)
    directions = tokens / lengths[:, None]
    alike = (directions @ directions.T - torch.eye(len(tokens), device=tokens.device)).sum(-1) / (len(tokens) - 1)
    off = tokens.new_zeros(len(tokens))
    for measure in (alike, lengths, directions.var(dim=-1)):
        low, high = measure.min(), measure.max()
        off = off + ((measure - low) / (high - low + 1e-8) - 0.5).abs()
    return off.argmin()


class DepthAnything3Encoder(ViewsEncoder):
    """Depth Anything 3's features of the views of a scene, which each have a place only inside themselves: their order says no more than
    which is the reference. Prefix: the camera token (class token where views never meet), not normalised."""

    Config: ClassVar[type[EncoderConfig]] = DepthAnything3Config
    config: DepthAnything3Config
    model: AlternatingViT

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 32, "depth": 4, "num_heads": 2, "patch_size": 4, "across_from": 2, "position_size": 16}
        return {"type": "depth_anything_3", **sizes, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def default_image(cls, config: DepthAnything3Config) -> ImageSpec:
        return ImageSpec(height=504, width=504, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @classmethod
    def build(cls, config: DepthAnything3Config) -> AlternatingViT:
        cls.check_sizes(config, config.width, config.num_heads)
        return AlternatingViT(config, depth=max(take_layers(config.layers, config.depth, lowest=1)))

    def read_views(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        counts = take_layers(self.config.layers, self.config.depth, lowest=1)
        cameras = None
        if self.config.known:
            cameras = pixels[:, 3].flatten(1)[:, :_POSE_SIZE]
            pixels = pixels[:, :3].to(self.dtype)
        outputs, found = self.model(pixels, views, counts, cameras), []
        for count in counts:
            x, alone = outputs[count]
            last = self.model.norm(x[:, 1:])
            tokens = last if alone is None else torch.cat([alone[:, 1:], last], dim=-1)
            prefix = x[:, :1] if alone is None else torch.cat([alone[:, :1], x[:, :1]], dim=-1)
            found.append(LayerOutput(tokens, self.own_grid, prefix))
        return found

    def load_pretrained(self) -> None:
        """From a checkpoint of the whole model (``model.backbone.pretrained.…``) or of its backbone."""
        own = set(self.model.state_dict())
        cameras = {name for name in own if name.startswith(_CAMERAS)}
        with self.read_once():
            source, state = self.published(own - cameras)
            beside = self.published(cameras)[1] if cameras else {}
        state.pop("mask_token", None)
        told = {name: tensor for name, tensor in beside.items() if name.startswith(_CAMERAS)}
        if cameras and not told:
            raise CheckpointError(
                f"weights: {source} has no camera encoder (cam_enc.…), by which known cameras are read; take the whole model's file, or "
                "remove known"
            )
        state |= told
        if any(key.startswith(f"blocks.{self.config.depth}.") for key in state):
            raise CheckpointError(f"weights: {source} is deeper than depth: {self.config.depth}")
        with torch.device("meta"):
            full = AlternatingViT(self.config, depth=self.config.depth)
        load_exactly(self.model, state, source=source, known=set(full.state_dict()), heads=())
