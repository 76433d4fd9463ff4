"""What do a few registers gather from each tile of a picture, talking to the registers of its other tiles: FALCON?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, merge_layers, take_layers
from mllm.errors import ConfigError
from mllm.types import ImageSpec, VisionFeatures

_EPS = 1e-6


class FalconConfig(BackboneConfig):
    """FALCON's visual registers (arXiv 2501.16297) in a SigLIP encoder; defaults are SigLIP-L/16 at 384 and 64 registers.
    Made for ``views: {type: tiles, dialect: falcon}``; a picture without tiles is one that is alone."""

    width: int = Field(default=1024, gt=0)
    depth: int = Field(default=24, gt=0)
    num_heads: int = Field(default=16, gt=0)
    mlp_width: int = Field(default=4096, gt=0)
    patch_size: int = Field(default=16, gt=0)
    num_registers: int = Field(default=64, gt=0)
    """M: tokens that each tile becomes."""
    max_tiles: int = Field(default=9, gt=0)
    """Most rows or columns of tiles; the table of places has one more, for the whole picture."""
    interactive: bool = True
    """Registers of all tiles of a picture attend to each other in every layer (ReAtten)."""


class FullAttention(nn.Module):
    """Attention of ``(B, N, D)`` to itself, under transformers' names. mask ``(B, 1, 1, N)``: true where a key is seen."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Scenes:
    """Which rows of a batch are tiles of one picture.

    index ``(S, most)``: the rows of every picture, in order, filled up with row 0; real ``(S, most)``: which of these are its
    own.
    """

    def __init__(self, scene_ids: Tensor):
        order = scene_ids.argsort(stable=True)
        counts = torch.unique_consecutive(scene_ids[order], return_counts=True)[1]
        numbers = torch.arange(int(counts.max()), device=counts.device)
        self.real = numbers < counts[:, None]
        starts = counts.cumsum(0) - counts
        self.index = order[(starts[:, None] + numbers).clamp(max=len(order) - 1)] * self.real


def ask_across_tiles(attention: FullAttention, x: Tensor, num_registers: int, scenes: Scenes | None) -> Tensor:
    """Tokens ``(B, N + M, D)`` with, added to the last M of every tile, what these see of the last M of all tiles of the same
    picture (None: every row is a picture of its own). The other tokens stay."""
    registers = x[:, -num_registers:]
    if scenes is None:
        return torch.cat([x[:, :-num_registers], registers + attention(registers)], dim=1)
    together = registers[scenes.index].flatten(1, 2)  # S, most · M, D
    mask = scenes.real.repeat_interleave(num_registers, dim=1)[:, None, None, :]
    seen = attention(together, mask).unflatten(1, (-1, num_registers))
    added = torch.zeros_like(registers).index_copy(0, scenes.index[scenes.real], seen[scenes.real].to(x.dtype))
    return torch.cat([x[:, :-num_registers], registers + added], dim=1)


class Mlp(nn.Module):
    """Linear, tanh GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """Pre-norm block; what registers see of other tiles is added to the attention's output, before the residual."""

    def __init__(self, config: FalconConfig):
        super().__init__()
        self.num_registers = config.num_registers
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.width, eps=_EPS) for _ in range(2))
        self.self_attn = FullAttention(config.width, config.num_heads)
        self.interact_attn = FullAttention(config.width, config.num_heads) if config.interactive else None
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, scenes: Scenes | None) -> Tensor:
        y = self.self_attn(self.layer_norm1(x))
        if self.interact_attn is not None:
            y = ask_across_tiles(self.interact_attn, y, self.num_registers, scenes)
        x = x + y
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Pixels → positioned patches, behind them the registers at the tile's place."""

    def __init__(self, config: FalconConfig, num_patches: int):
        super().__init__()
        self.whole = config.max_tiles
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(num_patches, config.width)
        self.vision_queries = token_table(1, config.num_registers, config.width)
        self.row_embedding = nn.Embedding(config.max_tiles + 1, config.width)
        self.column_embedding = nn.Embedding(config.max_tiles + 1, config.width)

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight
        places = torch.where(places < 0, self.whole, places)
        place = 0.5 * (self.row_embedding(places[:, 0]) + self.column_embedding(places[:, 1]))
        return torch.cat([patches, self.vision_queries + place[:, None]], dim=1)


class Blocks(nn.Module):
    def __init__(self, config: FalconConfig, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(depth))


class Falcon(nn.Module):
    """SigLIP with registers, under transformers' names."""

    recompute = False

    def __init__(self, config: FalconConfig, depth: int, last_norm: bool, num_patches: int):
        super().__init__()
        self.embeddings = Embeddings(config, num_patches)
        self.encoder = Blocks(config, depth)
        self.post_layernorm = nn.LayerNorm(config.width, eps=_EPS) if last_norm else None
        self.apply(init_linear)
        nn.init.normal_(self.embeddings.vision_queries)

    def forward(self, pixels: Tensor, scenes: Scenes | None, places: Tensor) -> list[Tensor]:
        """Patches and registers ``(B, N + M, D)`` before the first layer and after each, the last ones normed where there is a
        norm."""
        outputs = [self.embeddings(pixels, places)]
        for layer in self.encoder.layers:
            outputs.append(run(layer, outputs[-1], scenes, recompute=self.recompute))
        if self.post_layernorm is not None:
            outputs[-1] = self.post_layernorm(outputs[-1])
        return outputs


class FalconEncoder(BackboneEncoder):
    """M registers a tile. The weights of a plain SigLIP are taken too: attention across tiles starts as its own, registers and
    places fresh, as the authors begin."""

    Config: ClassVar[type[EncoderConfig]] = FalconConfig
    config: FalconConfig
    joins_views: ClassVar[bool] = True
    model: Falcon

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "mlp_width": 32, "patch_size": 4, "num_registers": 3}
        return {"type": "falcon", **sizes, "max_tiles": 6, "image_size": [16, 16]}

    @classmethod
    def default_image(cls, config: FalconConfig) -> ImageSpec:
        """CLIP's mean and deviation, as published, although the encoder is SigLIP's."""
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return ImageSpec(height=384, width=384, mean=mean, std=std)

    @classmethod
    def resolve(cls, config: FalconConfig) -> Any:
        config = super().resolve(config)
        return config.model_copy(update={"info": config.resolved_info.model_copy(update={"in_place": False})})

    @classmethod
    def build(cls, config: FalconConfig) -> Falcon:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        image = config.resolved_info.image if config.info is not None else cls.default_image(config)
        require_multiple(image, config.patch_size, "one patch")
        depth = max(take_layers(config.layers, config.depth))
        count = (image.height // config.patch_size) * (image.width // config.patch_size)
        return Falcon(config, depth, config.final_norm and depth == config.depth, count)

    @classmethod
    def published_names(cls, config: FalconConfig) -> set[str]:
        return super().published_names(config.model_copy(update={"interactive": True}))

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: FalconConfig) -> dict[str, Tensor]:
        """Only the vision part of a whole SigLIP, without its pooling head."""
        return {
            key: value
            for key, value in state.items()
            if "text_model." not in key and ".head." not in key and "logit_" not in key
        }

    @classmethod
    def absent(cls, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = ("vision_queries", "row_embedding", "column_embedding")
        found = {key: value for key, value in own.items() if key.split(".")[1] in fresh and key not in state}
        for key in own:
            copied = key.replace(".interact_attn.", ".self_attn.")
            if ".interact_attn." in key and key not in state and copied in state:
                found[key] = state[copied]
        return found

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        places: Tensor | None = None,
        return_attention: bool = False,
    ) -> VisionFeatures:
        pixels = self.without_attention(pixels, return_attention)
        if pixels.shape[0] == 0:
            return self.empty_features(pixels)
        return merge_layers(self._read(pixels, scene_ids, places), self.config.keep_prefix)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        return self._read(pixels, None, None)

    def _read(self, pixels: Tensor, scene_ids: Tensor | None, places: Tensor | None) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        batch, device, most = len(pixels), pixels.device, self.config.max_tiles
        if places is None:
            places = torch.full((batch, 2), -1, device=device)
        elif not places.is_meta and int(places.max()) >= most:
            raise ConfigError(f"falcon encoder: tile {int(places.max()) + 1} of a row or column; max_tiles is {most}")
        scenes = None if scene_ids is None or scene_ids.is_meta else Scenes(scene_ids)
        outputs, count = self.model(pixels, scenes, places), self.config.num_registers
        return [
            LayerOutput(outputs[k][:, -count:], (1, count)) for k in take_layers(self.config.layers, self.config.depth)
        ]
