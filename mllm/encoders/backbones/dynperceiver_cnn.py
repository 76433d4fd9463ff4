"""Which CNNs does Dynamic Perceiver read, cut into a stem and four stages as its authors cut them, under their names?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import timm
import torch
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet

from mllm.errors import ConfigError

_REGNETS: dict[str, dict[str, Any]] = {  # RegNet's own table of the Y models
    "regnet_y_400mf": {"depth": 16, "w_0": 48, "w_a": 27.89, "w_m": 2.09, "group_width": 8},
    "regnet_y_800mf": {"depth": 14, "w_0": 56, "w_a": 38.84, "w_m": 2.4, "group_width": 16},
    "regnet_y_1_6gf": {"depth": 27, "w_0": 48, "w_a": 20.71, "w_m": 2.65, "group_width": 24},
    "regnet_y_3_2gf": {"depth": 21, "w_0": 80, "w_a": 42.63, "w_m": 2.66, "group_width": 24},
}
# In, kernel, expanded, out, squeeze and excite, activation, stride: MobileNetV3-Large.
_MOBILENET = [
    (16, 3, 16, 16, False, "RE", 1), (16, 3, 64, 24, False, "RE", 2), (24, 3, 72, 24, False, "RE", 1), (24, 5, 72, 40, True, "RE", 2),
    (40, 5, 120, 40, True, "RE", 1), (40, 5, 120, 40, True, "RE", 1), (40, 3, 240, 80, False, "HS", 2), (80, 3, 200, 80, False, "HS", 1),
    (80, 3, 184, 80, False, "HS", 1), (80, 3, 184, 80, False, "HS", 1), (80, 3, 480, 112, True, "HS", 1), (112, 3, 672, 112, True, "HS", 1),
    (112, 5, 672, 160, True, "HS", 2), (160, 5, 960, 160, True, "HS", 1), (160, 5, 960, 160, True, "HS", 1),
]  # fmt: skip
_MOBILENET_CUTS = (3, 5, 8, 14, 17)
"""Where the stem ends, and each stage: behind what halves the map, so that latents read the finer map's channels on the coarser."""
_MOBILENET_LAST = 1280

Parts = tuple[nn.Sequential, Sequence[nn.Module], list[int]]


class CnnSettings(Protocol):
    """What an encoder's config says of its CNN."""

    @property
    def cnn(self) -> str: ...

    @property
    def cnn_width(self) -> float: ...

    @property
    def cnn_depths(self) -> Sequence[int] | None: ...

    @property
    def cnn_channels(self) -> Sequence[int] | None: ...


def cut_cnn(config: CnnSettings) -> Parts:
    """A CNN's stem, its four stages, and the widths at the entry of each and of the last map. Raises `ConfigError` for sizes that it
    does not have."""
    if not config.cnn.startswith("resnet") and (config.cnn_depths or config.cnn_channels):
        raise ConfigError(f"cnn_depths, cnn_channels: {config.cnn} has its own; these are a ResNet's")
    if config.cnn in _REGNETS:
        if config.cnn_width != 1:
            raise ConfigError(f"cnn_width: {config.cnn} has its own widths; choose a larger or smaller RegNet")
        return _regnet(config.cnn)
    return _mobilenet(config.cnn_width) if config.cnn == "mobilenet_v3_large" else _resnet(config)


def last_widths(config: CnnSettings) -> int | None:
    """Hidden width of the classifiers behind the last map: a MobileNet's; None for CNNs with plain ones."""
    return _even(_MOBILENET_LAST * config.cnn_width) if config.cnn == "mobilenet_v3_large" else None


def _even(value: float) -> int:
    """The nearest multiple of 8, not below 0.9 of ``value``: MobileNet's rule."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def _resnet(config: CnnSettings) -> Parts:
    channels = list(config.cnn_channels or (64, 128, 256, 512))
    scaled = [int(config.cnn_width * width) for width in channels]
    options: dict[str, Any] = {"channels": scaled}
    if config.cnn_depths is not None:
        options["layers"] = list(config.cnn_depths)
    cnn: Any = timm.create_model(config.cnn, pretrained=False, num_classes=0, **options)
    widths = [int(info["num_chs"]) for info in cnn.feature_info]
    stem = int(64 * config.cnn_width)
    if stem != widths[0]:
        _narrow_stem(cnn, stem)
        widths[0] = stem
    parts = nn.Sequential(cnn.conv1, cnn.bn1, cnn.act1, cnn.maxpool)
    return parts, [getattr(cnn, f"layer{s}") for s in range(1, 5)], widths


def _narrow_stem(cnn: Any, width: int) -> None:
    """timm's ResNets have a stem of 64 channels whatever their stages have."""
    cnn.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    cnn.bn1 = nn.BatchNorm2d(width)
    first = cnn.layer1[0]
    old = first.conv1
    first.conv1 = nn.Conv2d(width, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
    out = first.conv3.out_channels if hasattr(first, "conv3") else first.conv2.out_channels
    first.downsample = None
    if width != out:
        first.downsample = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))


def _regnet(name: str) -> Parts:
    with torch.device("cpu"):  # its table of widths is computed with tensors
        params = BlockParams.from_init_params(**_REGNETS[name], se_ratio=0.25)
    cnn: Any = RegNet(params, num_classes=1, norm_layer=partial(nn.BatchNorm2d, eps=1e-5, momentum=0.1))
    stages = [getattr(cnn.trunk_output, f"block{s}") for s in range(1, 5)]
    return cnn.stem, stages, [32, *(int(width) for width in params.widths)]


def _mobilenet(width: float) -> Parts:
    rows = [InvertedResidualConfig(*row, 1, width) for row in _MOBILENET]
    cnn: Any = MobileNetV3(rows, _even(_MOBILENET_LAST * width), num_classes=1)
    features, cuts = list(cnn.features), _MOBILENET_CUTS
    parts = [nn.Sequential(*features[i:j]) for i, j in zip((0, *cuts), cuts)]
    widths = [rows[cut - 1].input_channels for cut in cuts[:-1]]
    return parts[0], parts[1:], [*widths, 6 * rows[-1].out_channels]


def authors_names(state: dict[str, Any]) -> dict[str, Any]:
    """Keys of the authors' RegNets, whose stages lie in ``cnn_body.block1`` …, in this module's names; others as they are."""
    renamed = {}
    for key, value in state.items():
        before, mark, after = key.partition("cnn_body.block")
        renamed[f"{before}cnn_body_stage{after}" if mark else key] = value
    return renamed
