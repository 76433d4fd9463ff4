"""What geometry do several views of one scene show, and how large is it in metres? Encoder and transformer of MapAnything (its heads:
`mapanything_heads`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, group_parameters, take_layers
from mllm.encoders.multiview import ViewsConfig, ViewsEncoder
from mllm.encoders.view_blocks import Block, DinoV2, ViewsModel
from mllm.encoders.weights import load_exactly
from mllm.errors import CheckpointError
from mllm.types import ImageSpec

HEADS = ("dense_head.", "pose_head.", "scale_head.")
"""Of the published model, its heads."""
_ALSO = ("dpt_feature_head.", "dpt_regressor_head.")
"""Further names of the dense head's tensors, where a file keeps all names."""
_GIVEN = tuple(
    f"{name}_encoder." for name in ("ray_dirs", "depth", "depth_scale", "cam_rot", "cam_trans", "cam_trans_scale")
)
"""What reads known lenses, depth and cameras, which are not given here."""
_BLOCKS, _DINOV2 = "info_sharing.self_attention_blocks.", "encoder.model.blocks."


class MapAnythingConfig(ViewsConfig):
    """MapAnything (arXiv 2509.13414) from pictures alone; defaults are the second release."""

    release: Literal[1, 2] = 2
    """1: as of September 2025 (v1). 2: feed-forward layers are gated (SwiGLU), DINOv2's last norm is left out, each view keeps its class
    token beside its patches, and the transformer across views has LayerScale."""
    width: int = Field(default=1536, gt=0)
    """C, channels of the transformer across views. Layer 0, what it is given, has dinov2_width."""
    depth: int = Field(default=16, gt=0)
    """Blocks of it: across the views of a scene and inside each view in turns. A layer is one block's output, normalised."""
    num_heads: int = Field(default=24, gt=0)
    dinov2_width: int = Field(default=1536, gt=0)
    dinov2_depth: int = Field(default=24, gt=0)
    dinov2_heads: int = Field(default=24, gt=0)
    dinov2_image_size: int = Field(default=518, gt=0)
    """Image size of DINOv2's position table, which is resized on use (bicubic)."""


class SceneTransformer(nn.Module):
    """The weights of MapAnything's transformer across views. depth: blocks that are built."""

    view_pos_table: Tensor

    def __init__(self, config: MapAnythingConfig, depth: int):
        super().__init__()
        width, new = config.width, config.release == 2
        self.proj_embed = nn.Identity() if config.dinov2_width == width else nn.Linear(config.dinov2_width, width)
        self.self_attention_blocks = nn.ModuleList(
            Block(width, config.num_heads, qk_norm=False, scale=1e-5 if new else None, eps=1e-6, gated=new)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("view_pos_table", torch.arange(width).remainder(2).float()[None])
        """What the tokens of a scene's first view are marked with: waves at place 0."""


class MapAnythingModel(ViewsModel):
    """DINOv2 of each view, then attention across the views of a scene, with one token that tells its scale, and inside each view, in
    turns. Views have no order but for the first, to which all refer."""

    def __init__(self, config: MapAnythingConfig, depth: int):
        super().__init__()
        self.class_tokens = config.release == 2
        dinov2 = DinoV2(
            config.dinov2_width,
            config.dinov2_heads,
            depth=config.dinov2_depth,
            patch_size=config.patch_size,
            image_size=config.dinov2_image_size,
            num_registers=None,
            antialias=False,
            gated=config.release == 2,
            normed=config.release == 1,
        )
        self.encoder = nn.ModuleDict({"model": dinov2})
        self.fusion_norm_layer = nn.LayerNorm(config.dinov2_width, eps=1e-6)
        self.scale_token = nn.Parameter(torch.randn(config.dinov2_width) * 0.02)
        self.info_sharing = SceneTransformer(config, depth)

    def forward(self, pixels: Tensor, views: Sequence[int], wanted: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """pixels ``(B, 3, H, W)``, ImageNet-normalised, the views of a scene side by side; views: how many each scene has, in order;
        wanted: counts of blocks → ``{count: (patches (B, N, C), scale and class tokens (B, P, C))}``."""
        tokens = self.encoder["model"](pixels, self.run)
        special = int(self.class_tokens)
        x = torch.cat([tokens[:, :special], self.fusion_norm_layer(tokens[:, 1:])], dim=1)
        scale = self.scale_token.expand(len(views), 1, -1)
        counts = torch.tensor(list(views), device=pixels.device)

        def told(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            """Patches, and a scene's scale token beside each view's own."""
            beside = scale.repeat_interleave(counts, dim=0, output_size=len(x))
            return x[:, special:], torch.cat([beside, x[:, :special]], dim=1)

        outputs = {0: told(x, scale)} if 0 in wanted else {}
        x, scale = self.info_sharing.proj_embed(x), self.info_sharing.proj_embed(scale)
        first = torch.tensor([view == 0 for count in views for view in range(count)], device=pixels.device)
        x = x + first[:, None, None] * self.info_sharing.view_pos_table
        for number, block in enumerate(self.info_sharing.self_attention_blocks):
            if number % 2:
                x = self.run(block, x, None)
            else:
                x, scale = self.across(block, x, scale, views)
            if number + 1 in wanted:
                outputs[number + 1] = told(self.info_sharing.norm(x), self.info_sharing.norm(scale))
        return outputs

    def across(self, block: nn.Module, x: Tensor, scale: Tensor, views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A block over the tokens ``(B, N, C)`` of each scene's views and the scene's own ``(scenes, 1, C)``; scenes with equally many
        views run as one batch."""
        if len(set(views)) == 1:
            wide = torch.cat([x.reshape(len(views), -1, x.shape[2]), scale], dim=1)
            wide = self.run(block, wide, None)
            return wide[:, :-1].reshape(x.shape), wide[:, -1:]
        scenes = zip(x.split(list(views)), scale.split(1), strict=True)
        found = [self.across(block, part, one, [len(part)]) for part, one in scenes]
        return torch.cat([part for part, _ in found]), torch.cat([one for _, one in found])


class MapAnythingEncoder(ViewsEncoder):
    """MapAnything's features of the views of a scene, which all refer to its first one. Prefix: the scene's scale token, the same for each
    of its views, and of release 2 the view's class token."""

    Config: ClassVar[type[EncoderConfig]] = MapAnythingConfig
    config: MapAnythingConfig
    model: MapAnythingModel

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 32, "depth": 4, "num_heads": 2, "patch_size": 4}
        dinov2 = {"dinov2_width": 32, "dinov2_depth": 1, "dinov2_heads": 2, "dinov2_image_size": 16}
        return {"type": "mapanything", **sizes, **dinov2, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def default_image(cls, config: MapAnythingConfig) -> ImageSpec:
        return ImageSpec(height=518, width=518, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @classmethod
    def build(cls, config: MapAnythingConfig) -> MapAnythingModel:
        cls.check_sizes(config, config.width, config.num_heads)
        cls.check_sizes(config, config.dinov2_width, config.dinov2_heads)
        return MapAnythingModel(config, depth=max(take_layers(config.layers, config.depth)))

    def read_views(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        counts = take_layers(self.config.layers, self.config.depth)
        outputs = self.model(pixels, views, counts)
        return [LayerOutput(outputs[count][0], self.own_grid, outputs[count][1]) for count in counts]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        count = len(self.model.info_sharing.self_attention_blocks)
        return group_parameters(
            [name for name, _ in self.named_parameters()], [f"model.{_BLOCKS}{i}." for i in range(count)]
        )

    def load_pretrained(self) -> None:
        """From a checkpoint of the whole model, or of what comes before its heads."""
        source, state = self.published(set(self.model.state_dict()))
        state = {key: value for key, value in state.items() if not key.startswith((*HEADS, *_ALSO, *_GIVEN))}
        for blocks, key in ((_BLOCKS, "depth"), (_DINOV2, "dinov2_depth")):
            depth = getattr(self.config, key)
            if any(name.startswith(f"{blocks}{depth}.") for name in state):
                raise CheckpointError(f"weights: {source} is deeper than {key}: {depth}")
        with torch.device("meta"):
            full = MapAnythingModel(self.config, depth=self.config.depth)
        load_exactly(self.model, state, source=source, known=set(full.state_dict()), heads=())
