"""What do encoders have in common that run SAM's image encoder with convolutions beside it (arXiv 2304.02643)?"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import take_layers
from mllm.errors import ConfigError

_NAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
)
_TRUNK = re.compile(r"(?:^|.*\.)(?:image_encoder|vision_encoder)\.(.+)")
_PAIRS = 1 << 29
"""Pairs of positions, over heads and pictures, whose summands of attention are written at once: 1 GiB in bf16."""
_OTHERS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")


class SamTrunkConfig(BackboneConfig):
    """SAM's image encoder; defaults are ViT-B's."""

    width: int = Field(default=768, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=16, gt=1)
    window_size: int = Field(default=14, gt=0)
    global_blocks: list[int] = Field(default=[2, 5, 8, 11], min_length=1)
    """Blocks, from 0, that see the whole picture; the others see windows."""
    neck_width: int = Field(default=256, gt=0)
    """Channels after the neck, which is SAM's last norm: with ``final_norm`` a mask decoder reads what SAM's reads."""
    trained_size: int = Field(default=1024, gt=0)
    """Pixels a side of the position tables; they are resized for other pictures."""


def sam_trunk(config: SamTrunkConfig, *, depth: int, neck: bool) -> SamVisionEncoder:
    """SAM's first ``depth`` blocks, and its neck or none. Raises `ConfigError` for sizes that do not fit one another."""
    if config.width % config.num_heads:
        raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
    if config.patch_size & (config.patch_size - 1):
        raise ConfigError(f"patch_size: {config.patch_size} is no power of two; the convolutions beside SAM halve")
    if max(config.global_blocks) >= config.depth or sorted(set(config.global_blocks)) != config.global_blocks:
        raise ConfigError(f"global_blocks: name blocks from 0 to {config.depth - 1} once each, in their order")
    sizes: Any = SamVisionConfig(
        hidden_size=config.width,
        num_hidden_layers=depth,
        num_attention_heads=config.num_heads,
        mlp_dim=int(config.width * config.mlp_ratio),
        patch_size=config.patch_size,
        image_size=config.trained_size,
        window_size=config.window_size,
        global_attn_indexes=config.global_blocks,
        output_channels=config.neck_width,
    )
    sizes._attn_implementation = "sdpa"
    trunk: Any = SamVisionEncoder(sizes)
    if not neck:
        trunk.neck = nn.Identity()
    return trunk


def enter(trunk: Any, pixels: Tensor) -> Tensor:
    """Pixels ``(B, 3, H, W)`` → patches ``(B, rows, cols, C)`` with SAM's positions, resized where the grid is another."""
    x = trunk.patch_embed.projection(pixels).permute(0, 2, 3, 1)
    table = trunk.pos_embed
    if table.shape[1:3] != x.shape[1:3]:
        resized = F.interpolate(
            table.float().permute(0, 3, 1, 2), x.shape[1:3], mode="bicubic", align_corners=False, antialias=True
        )
        table = resized.permute(0, 2, 3, 1).to(table.dtype)
    return x + table


def see(layer: Any, x: Tensor) -> Tensor:
    """One of SAM's blocks ``(B, rows, cols, C)`` → the same. A block that sees the whole picture writes a summand for every pair of
    positions and head: it gets as many pictures at once as `_PAIRS` are good for."""
    if layer.window_size:
        return _seen(layer, x)
    pairs = layer.attn.num_attention_heads * (x.shape[1] * x.shape[2]) ** 2
    return torch.cat([_seen(layer, part) for part in x.split(max(1, _PAIRS // pairs))])


def _seen(layer: Any, x: Tensor) -> Tensor:
    """What a block gives; older transformers wrap it."""
    found = layer(x)
    return found[0] if isinstance(found, tuple) else found


class SamSidedEncoder(BackboneEncoder):
    """SAM's image encoder with something beside it. Weights are SAM's (``sam_vit_*.pth`` or transformers' names), in which case what
    stands beside it is new and must learn, or this encoder's own."""

    Config: ClassVar[type[EncoderConfig]] = SamTrunkConfig
    config: SamTrunkConfig
    model: Any

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: SamTrunkConfig) -> dict[str, Tensor]:
        """SAM's image encoder under ``vit.``; its prompt encoder and mask decoder are heads."""
        found = {}
        for name, value in state.items():
            if match := _TRUNK.fullmatch(name):
                name = f"vit.{match[1]}"
                for former, present in _NAMES:
                    name = name.replace(former, present)
            elif any(other in name for other in _OTHERS):
                continue
            found[name] = value
        return found

    @classmethod
    def absent(cls, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that stands beside SAM, where the file is SAM's; a part of it only is no such file."""
        if any(not name.startswith("vit.") for name in state if name in own):
            return super().absent(state, own)
        return {name: value for name, value in own.items() if not name.startswith("vit.")}

    @classmethod
    def published_names(cls, config: SamTrunkConfig) -> set[str]:
        with torch.device("meta"):
            return set(cls.build(config.model_copy(update={"layers": [-1], "final_norm": True})).state_dict())

    @classmethod
    def fits(cls, config: SamTrunkConfig) -> None:
        """Raise `ConfigError` unless the picture is a whole number of patches."""
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patches")

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """SAM's blocks are the layers, with what acts right after or before them; the neck is the norm."""
        names = [name for name, _ in self.named_parameters()]
        groups: dict[str, list[str]] = {
            "embeddings": ["model.vit.patch_embed.", "model.vit.pos_embed", *self.entries()]
        }
        for i in range(len(self.model.vit.layers)):
            groups[f"layers.{i}"] = [f"model.vit.layers.{i}.", *self.beside(i)]
        groups["norm"] = ["model.vit.neck.", *self.ends()]
        present = {group: [p for p in own if any(n.startswith(p) for n in names)] for group, own in groups.items()}
        return [(group, own) for group, own in present.items() if own]

    def entries(self) -> list[str]:
        """Prefixes of what runs before SAM's first block."""
        return []

    def beside(self, block: int) -> list[str]:
        """Prefixes of what acts with SAM's block."""
        return []

    def ends(self) -> list[str]:
        """Prefixes of what runs after the last block."""
        return []


def deepest(layers: list[int], places: list[int]) -> list[int]:
    """Which of ``places`` (numbers of blocks) are handed out, for ``layers`` that count them from 1."""
    return [places[count - 1] for count in take_layers(layers, len(places), lowest=1)]
