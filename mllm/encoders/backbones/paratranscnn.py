"""What does ParaTransCNN see: a ResNet and a transformer pyramid side by side, weighed channel by channel (arXiv 2401.15307)?"""

from __future__ import annotations

from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import SelfAttention, drop, drop_rates, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, map_to_tokens, take_layers
from mllm.errors import ConfigError

Three = tuple[int, int, int]
_HEADS = ("decoder", "up", "out")


class ParaTransCnnConfig(BackboneConfig):
    """ParaTransCNN's encoder; defaults are the authors'."""

    width: int = Field(default=320, gt=0)
    """Of the transformer's first stage; twice and four times that in the others."""
    depths: Three = (3, 3, 3)
    num_heads: int = Field(default=8, gt=0)
    cnn_channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Of the ResNet-34 beside it."""
    cnn_depths: tuple[int, int, int, int] = (3, 4, 6, 3)


class Residual(nn.Module):
    """``x + drop(fn(norm(x)))`` under the authors' names ``fn.norm`` and ``fn.fn``."""

    def __init__(self, width: int, inner: nn.Module, rate: float):
        super().__init__()
        self.fn = nn.ModuleDict({"norm": nn.LayerNorm(width), "fn": inner})
        self.drop_path = drop(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn["fn"](self.fn["norm"](x)))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear, with the places of the authors' dropouts."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Identity(), nn.Linear(2 * width, width), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Attention(SelfAttention):
    def __init__(self, width: int, num_heads: int):
        super().__init__(width, num_heads, bias=False)
        self.proj = nn.Linear(width, width)


class TransformerStage(nn.Module):
    def __init__(self, width: int, depth: int, num_heads: int, rates: list[float]):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                Residual(width, _Attention(width, num_heads), rates[i]),
                Residual(width, FeedForward(width), rates[i]),
            ]
        self.net = nn.Sequential(*layers)


class ChannelAttention(nn.Module):
    """``(B, C, rows, cols)`` to the same shape, each channel times a gate of all channels' means."""

    def __init__(self, width: int):
        super().__init__()
        hidden = width // 16
        self.fc = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[..., None, None]


class ParaTransCnn(nn.Module):
    """Pixels to three maps at a quarter, an eighth and a sixteenth, under the authors' names."""

    recompute = False

    def __init__(self, config: ParaTransCnnConfig):
        super().__init__()
        widths = [config.width << s for s in range(3)]
        cnn: Any = timm.create_model(
            "resnet34", pretrained=False, num_classes=0, channels=config.cnn_channels, layers=config.cnn_depths
        )
        self.firstconv, self.firstbn = cnn.conv1, cnn.bn1
        for s in range(4):
            self.add_module(f"encoder{s + 1}", getattr(cnn, f"layer{s + 1}"))
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        before = 3
        for s, width in enumerate(widths):
            side = 4 if s == 0 else 2
            self.add_module(f"patch_embed_{s + 1}", nn.Conv2d(before, width, side, stride=side))
            own = [next(rates) for _ in range(config.depths[s])]
            self.add_module(f"vit_{s + 1}", TransformerStage(width, config.depths[s], config.num_heads, own))
            # The authors count these from the coarsest map.
            self.add_module(f"SE_{3 - s}", ChannelAttention(width + config.cnn_channels[s + 1]))
            before = width
        for name, module in self.named_children():
            if name.startswith(("vit", "SE")):
                module.apply(init_linear)

    def branches(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The transformer's maps and the ResNet's, at a quarter, an eighth and a sixteenth. Its stem has no pooling."""
        learns = self.recompute and not self.firstbn.training
        x = F.relu(self.firstbn(self.firstconv(pixels)))
        x = run(self.encoder1, x, recompute=learns)  # type: ignore[arg-type]
        convolved, attended, y = [], [], pixels
        for s in range(3):
            x = run(getattr(self, f"encoder{s + 2}"), x, recompute=learns)
            convolved.append(x)
            y = getattr(self, f"patch_embed_{s + 1}")(y)
            tokens = y.flatten(2).transpose(1, 2)
            for layer in getattr(self, f"vit_{s + 1}").net:
                tokens = run(layer, tokens, recompute=self.recompute)
            y = tokens.transpose(1, 2).unflatten(2, y.shape[2:])
            attended.append(y)
        return attended, convolved

    def forward(self, pixels: Tensor) -> list[Tensor]:
        pairs = zip(*self.branches(pixels), strict=True)
        gates = [getattr(self, f"SE_{3 - s}") for s in range(3)]
        return [gate(torch.cat(pair, dim=1)) for gate, pair in zip(gates, pairs, strict=True)]


class ParaTransCnnEncoder(BackboneEncoder):
    """Both branches side by side. ``layers`` counts maps: 1 at a quarter, 2 at an eighth, 3 ([-1]) at a sixteenth. There are no
    positions and no last norm."""

    Config: ClassVar[type[EncoderConfig]] = ParaTransCnnConfig
    config: ParaTransCnnConfig
    model: ParaTransCnn

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "paratranscnn",
            "width": 8,
            "depths": [1, 1, 1],
            "num_heads": 2,
            "cnn_channels": [8, 8, 16, 16],
            "cnn_depths": [1, 1, 1, 1],
            "image_size": [32, 48],
            "layers": [1, 2, -1],
        }

    @classmethod
    def build(cls, config: ParaTransCnnConfig) -> ParaTransCnn:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        for s in range(3):
            if (config.width << s) + config.cnn_channels[s + 1] < 16:
                raise ConfigError(f"width: map {s + 1} has fewer than the 16 channels that its gate needs")
        if config.info is not None:
            require_multiple(config.info.image, 16, "the coarsest map is a sixteenth")
        return ParaTransCnn(config)

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: ParaTransCnnConfig) -> dict[str, Tensor]:
        """Without the decoder, which is a segmentation head."""
        return {k: v for k, v in state.items() if not k.rpartition("module.")[2].startswith(_HEADS)}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        maps = self.model(pixels)
        return [map_to_tokens(maps[count - 1]) for count in take_layers(self.config.layers, 3, lowest=1)]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        together = [
            ("embeddings", ("firstconv", "firstbn", "encoder1", "patch_embed_1")),
            ("layers.0", ("encoder2", "vit_1", "SE_3")),
            ("layers.1", ("encoder3", "patch_embed_2", "vit_2", "SE_2")),
            ("layers.2", ("encoder4", "patch_embed_3", "vit_3", "SE_1")),
        ]
        return [(group, [f"model.{name}." for name in names]) for group, names in together]
