"""What does SAM see with a ResNet beside it that speaks before each block which sees the whole picture (SAM-UNet, arXiv 2408.09886)?"""

from __future__ import annotations

from typing import Any, ClassVar

import timm
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from mllm.encoders.backbones.base import require_multiple
from mllm.encoders.backbones.layers import IMAGENET, run
from mllm.encoders.backbones.samtrunk import SamSidedEncoder, SamTrunkConfig, deepest, enter, sam_trunk, see
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, map_to_tokens, take_layers
from mllm.errors import ConfigError
from mllm.types import ImageSpec

_STRIDES = (4, 8, 16, 32)


class SamUnetConfig(SamTrunkConfig):
    """SAM-UNet's image encoder; defaults are the authors' with ViT-B and ResNet-34."""

    cnn_channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    cnn_depths: tuple[int, int, int, int] = (3, 4, 6, 3)


class Reshaper(nn.Module):
    """A map ``(B, C, ·, ·)`` of one stride → ``(B, width, rows, cols)`` of another, by factors of two.

    Channels double as sides halve, and halve as sides double; a 1 × 1 convolution gives the width.
    """

    def __init__(self, channels: int, width: int, stride: int, wanted: int):
        super().__init__()
        layers: list[nn.Module] = []
        while stride < wanted:
            layers += _step(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1))
            channels, stride = 2 * channels, 2 * stride
        while stride > wanted:
            if channels % 2:
                raise ConfigError(f"cnn_channels: {channels} cannot be halved on the way to a finer grid")
            layers += _step(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels, stride = channels // 2, stride // 2
        self.reshaper = nn.Sequential(*layers, nn.Conv2d(channels, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.reshaper(x)


def _step(convolution: Any) -> list[nn.Module]:
    return [convolution, LayerNorm2d(convolution.out_channels, eps=1e-6), nn.GELU()]


class SamUnet(nn.Module):
    """Pixels to the maps after the global blocks ``(B, rows, cols, C)``, the last of all through SAM's neck where there is one."""

    recompute = False

    def __init__(self, config: SamUnetConfig):
        super().__init__()
        places = config.global_blocks
        used = deepest(config.layers, places)
        needed = places.index(max(used)) + 1
        whole = needed == len(places)
        self.places, self.has_neck = places[:needed], config.final_norm and whole
        depth = config.depth if self.has_neck else max(used) + 1
        self.vit = sam_trunk(config, depth=depth, neck=self.has_neck)
        cnn: Any = timm.create_model(
            "resnet34", pretrained=False, num_classes=0, channels=config.cnn_channels, layers=config.cnn_depths
        )
        self.resnet = nn.ModuleDict({"conv1": cnn.conv1, "bn1": cnn.bn1})
        for number in range(1, needed + 1):
            self.resnet[f"layer{number}"] = getattr(cnn, f"layer{number}")
        self.adapters = nn.ModuleList(
            Reshaper(config.cnn_channels[s], config.width, _STRIDES[s], config.patch_size) for s in range(needed)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        y = F.relu(self.resnet["bn1"](self.resnet["conv1"](pixels)))
        y = F.max_pool2d(y, 3, stride=2, padding=1)
        x, maps = enter(self.vit, pixels), []
        learns = self.recompute and not self.resnet["bn1"].training  # batch norms would count pictures twice
        for number, layer in enumerate(self.vit.layers):
            if number in self.places:
                stage = self.places.index(number)
                y = run(self.resnet[f"layer{stage + 1}"], y, recompute=learns)
                x = x + self.adapters[stage](y).permute(0, 2, 3, 1)
            x = run(see, layer, x, recompute=self.recompute)
            if number in self.places:
                maps.append(x)
        if self.has_neck:
            maps[-1] = self.vit.neck(x).permute(0, 2, 3, 1)
        return maps


class SamUnetEncoder(SamSidedEncoder):
    """``layers`` counts SAM's global blocks: [1, 2, 3, -1] hands out the three that SAM-UNet's mask decoder bridges and, with
    ``final_norm``, the neck's map last."""

    Config: ClassVar[type[EncoderConfig]] = SamUnetConfig
    config: SamUnetConfig
    model: SamUnet

    @classmethod
    def default_image(cls, config: SamUnetConfig) -> ImageSpec:
        return ImageSpec(height=256, width=256, **IMAGENET)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "samunet",
            "width": 32,
            "depth": 4,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": 8,
            "window_size": 3,
            "global_blocks": [0, 1, 2, 3],
            "neck_width": 16,
            "trained_size": 64,
            "cnn_channels": [8, 8, 16, 16],
            "cnn_depths": [1, 1, 1, 1],
            "image_size": [64, 96],
            "layers": [1, 2, 3, -1],
        }

    @classmethod
    def build(cls, config: SamUnetConfig) -> SamUnet:
        if len(config.global_blocks) != len(_STRIDES):
            raise ConfigError(
                f"global_blocks: name four; each of the ResNet's stages speaks before one, not {config.global_blocks}"
            )
        cls.fits(config)
        if config.info is not None:
            require_multiple(config.info.image, 32, "the ResNet's last map is a thirty-second")
        return SamUnet(config)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        maps = self.model(pixels)
        counts = take_layers(self.config.layers, len(_STRIDES), lowest=1)
        return [map_to_tokens(maps[count - 1].permute(0, 3, 1, 2)) for count in counts]

    def entries(self) -> list[str]:
        return ["model.resnet.conv1.", "model.resnet.bn1."]

    def beside(self, block: int) -> list[str]:
        if block not in self.model.places:
            return []
        stage = self.model.places.index(block)
        return [f"model.resnet.layer{stage + 1}.", f"model.adapters.{stage}."]
