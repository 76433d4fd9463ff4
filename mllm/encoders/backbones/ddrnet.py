"""What do DDRNet's two resolutions see: one branch stays at an eighth, one goes down to a sixty-fourth (arXiv 2101.06085)?"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import IMAGENET, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError
from mllm.types import ImageSpec

_HEADS = ("final_layer", "seghead_extra")
"""Parts of published checkpoints that name classes; they are no part of the encoder."""


class DdrNetConfig(BackboneConfig):
    """Defaults are DDRNet-23-slim; DDRNet-23 has ``planes: 64``, DDRNet-39 also ``depths: [3, 4, 6, 3]`` and ``exchanges: 3``."""

    planes: int = Field(default=32, ge=1)
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    exchanges: Literal[2, 3] = 2
    """How often the branches exchange; 3: the third stage is cut in two, and the fine branch is as deep as the coarse one."""
    pooled_planes: int = Field(default=128, ge=1)
    """Width inside the pyramid of pools (DAPPM)."""


def _norm_act_conv(width_in: int, width_out: int, kernel: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width_in),
        nn.ReLU(),
        nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False),
    )


def _down(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.ReLU()] if layers else []
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers)


def _shortcut(width_in: int, width_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and width_in == width_out:
        return None
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False), nn.BatchNorm2d(width_out))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut; the stage's last one hands its sum out before the ReLU."""

    def __init__(self, width_in: int, width: int, stride: int, last: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.downsample = _shortcut(width_in, width, stride)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = y + (x if self.downsample is None else self.downsample(x))
        return y if self.last else F.relu(y)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 to twice the width; the sum is handed out before a ReLU."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.downsample = _shortcut(width, 2 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))


class PooledPyramid(nn.Module):
    """DAPPM: pools of growing size, each added to the one before; averages count the zeros of the padding."""

    def __init__(self, width_in: int, inner: int, width_out: int):
        super().__init__()
        self.scale0 = _norm_act_conv(width_in, inner)
        for number, (kernel, stride) in enumerate(((5, 2), (9, 4), (17, 8)), 1):
            pool = nn.AvgPool2d(kernel, stride, kernel // 2)
            setattr(self, f"scale{number}", nn.Sequential(pool, *_norm_act_conv(width_in, inner)))
        self.scale4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_norm_act_conv(width_in, inner))
        for number in range(1, 5):
            setattr(self, f"process{number}", _norm_act_conv(inner, inner, 3))
        self.compression = _norm_act_conv(5 * inner, width_out)
        self.shortcut = _norm_act_conv(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.scale0(x)]
        for number in range(1, 5):
            pooled = _to(getattr(self, f"scale{number}")(x), x.shape[-2:])
            found.append(getattr(self, f"process{number}")(pooled + found[-1]))
        return self.compression(torch.cat(found, 1)) + self.shortcut(x)


def _to(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DdrNet(nn.Module):
    """Both branches and their exchanges, under the authors' names."""

    recompute = False

    def __init__(self, config: DdrNetConfig):
        super().__init__()
        p, depths = config.planes, config.depths

        def stage(width_in: int, width: int, depth: int, stride: int) -> nn.Sequential:
            first = BasicBlock(width_in, width, stride, last=False)
            return nn.Sequential(first, *(BasicBlock(width, width, 1, k == depth - 1) for k in range(1, depth)))

        self.conv1 = nn.Sequential(
            nn.Conv2d(3, p, 3, stride=2, padding=1), nn.BatchNorm2d(p), nn.ReLU(),
            nn.Conv2d(p, p, 3, stride=2, padding=1), nn.BatchNorm2d(p), nn.ReLU(),
        )  # fmt: skip
        self.layer1, self.layer2 = stage(p, p, depths[0], 1), stage(p, 2 * p, depths[1], 2)
        parts = config.exchanges - 1
        self.names = ["3", "4"] if parts == 1 else ["3_1", "3_2", "4"]
        before = 2 * p
        for number, name in enumerate(self.names):
            last = number == parts
            width, depth = (8 * p, depths[3]) if last else (4 * p, depths[2] // parts)
            finer = 2 if parts == 1 else depth
            self.add_module(f"layer{name}", stage(before, width, depth, 2 if last or number == 0 else 1))
            self.add_module(f"layer{name}_", stage(2 * p, 2 * p, finer, 1))
            compress = nn.Sequential(nn.Conv2d(width, 2 * p, 1, bias=False), nn.BatchNorm2d(2 * p))
            self.add_module(f"compression{name}", compress)
            self.add_module(f"down{name}", _down(2 * p, 4 * p, 8 * p) if last else _down(2 * p, 4 * p))
            before = width
        self.layer5_ = nn.Sequential(Bottleneck(2 * p, 1))
        self.layer5 = nn.Sequential(Bottleneck(8 * p, 2))
        self.spp = PooledPyramid(16 * p, config.pooled_planes, 4 * p)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps at an eighth: before the branches part, after each exchange, and both branches' sum."""
        x = run(self.layer1, self.conv1(pixels), recompute=self.recompute)
        low = high = run(self.layer2, F.relu(x), recompute=self.recompute)
        size, maps = high.shape[-2:], [high]
        for name in self.names:
            deeper, finer = getattr(self, f"layer{name}"), getattr(self, f"layer{name}_")
            down, compress = getattr(self, f"down{name}"), getattr(self, f"compression{name}")
            low = run(deeper, F.relu(low), recompute=self.recompute)
            high = run(finer, F.relu(high), recompute=self.recompute)
            low, high = low + down(F.relu(high)), high + _to(compress(F.relu(low)), size)
            maps.append(high)
        high = run(self.layer5_, F.relu(high), recompute=self.recompute)
        low = run(self.layer5, F.relu(low), recompute=self.recompute)
        return [*maps, high + _to(self.spp(low), size)]


class DdrNetEncoder(BackboneEncoder):
    """Tokens of the fine branch's grid, an eighth of the image's sides. ``layers`` counts maps: 1 before the branches part, 2 and more
    after their exchanges, the last one ([-1]) both branches' sum. There is no last norm."""

    Config: ClassVar[type[EncoderConfig]] = DdrNetConfig
    config: DdrNetConfig
    model: DdrNet

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "ddrnet", "planes": 4, "pooled_planes": 8, "image_size": 64, "layers": [1, -1]}

    @classmethod
    def default_image(cls, config: DdrNetConfig) -> ImageSpec:
        return ImageSpec(height=512, width=512, **IMAGENET)

    @classmethod
    def build(cls, config: DdrNetConfig) -> DdrNet:
        if config.exchanges == 3 and config.depths[2] % 2:
            raise ConfigError(
                f"depths: the third stage is cut in two with exchanges: 3, and its {config.depths[2]} blocks are odd"
            )
        if config.info is not None:
            require_multiple(config.info.image, 64, "the coarse branch is a sixty-fourth")
        return DdrNet(config)

    @classmethod
    def published_names(cls, config: DdrNetConfig) -> set[str]:
        with torch.device("meta"):
            own = set(cls.build(config).state_dict())
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        heads = {f"{head}.bn{k}.{name}" for head in _HEADS for k in (1, 2) for name in norm}
        return (
            own
            | heads
            | {f"{head}.{name}" for head in _HEADS for name in ("conv1.weight", "conv2.weight", "conv2.bias")}
        )

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        maps = self.model(pixels)
        chosen = [maps[count - 1] for count in take_layers(self.config.layers, self.config.exchanges + 2, lowest=1)]
        return [LayerOutput(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])) for x in chosen]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        kinds = ("layer{}.", "layer{}_.", "down{}.", "compression{}.")
        exchanges = [[f"model.{kind.format(name)}" for kind in kinds] for name in self.model.names]
        together = [*exchanges, ["model.layer5.", "model.layer5_.", "model.spp."]]
        first = ("embeddings", ["model.conv1.", "model.layer1.", "model.layer2."])
        return [first, *((f"layers.{k}", prefixes) for k, prefixes in enumerate(together))]
