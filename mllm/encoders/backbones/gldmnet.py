"""What do two streams see, one of colour and one of depth, that look into each other at every scale: GL-DMNet (arXiv 2501.01648)?"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import timm
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneEncoder, PanelConfig, planes_of, require_multiple
from mllm.encoders.backbones.layers import BATCH_NORMS, Block, drop_rates, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError

_STAGES = 4


class GlDmNetConfig(PanelConfig):
    """GL-DMNet's structure. Paper only: no formulas are public, so the two fusions are stand-ins (cross attention over places, and
    over channels by their Gram matrix, both in both directions) and no claim to its numbers is made."""

    panels: Literal[2] = 2  # type: ignore[assignment]
    """Colour, and under it depth (grey: the mean of its three channels is read)."""
    cnn: Literal["resnet18", "resnet34", "resnet50"] = "resnet34"
    cnn_depths: tuple[int, int, int, int] | None = None
    """Blocks of the stages. Default: the ResNet's own."""
    cnn_channels: tuple[int, int, int, int] | None = None
    """Inner channels of the stages. Default: the ResNet's own (64 to 512)."""
    inner: int = Field(default=64, gt=0)
    """Width in which places of the two streams are compared."""
    pooled: int = Field(default=14, ge=1)
    """Rows and columns of the other stream's map that are read, at most: what makes the large maps affordable."""
    output: Literal["fused", "decoded"] = "fused"
    """fused: the joined maps of the stages that ``layers`` names (1: stride 4 to 4: stride 32). decoded: the cascade from the deepest
    stage up to stride 8."""
    decoder_width: int = Field(default=256, gt=0)
    decoder_depth: int = Field(default=1, ge=1)
    """Transformer blocks at each of the cascade's three steps."""
    decoder_heads: int = Field(default=4, gt=0)


class PlaceFusion(nn.Module):
    """Places of one map ``(B, C, rows, cols)`` read those of another."""

    def __init__(self, width: int, inner: int, pooled: int):
        super().__init__()
        self.pooled = pooled
        self.q, self.k = nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1)
        self.v = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        size = (min(self.pooled, other.shape[2]), min(self.pooled, other.shape[3]))
        other = F.adaptive_avg_pool2d(other, size)
        q, k, v = (part.flatten(2).transpose(1, 2) for part in (self.q(x), self.k(other), self.v(other)))
        found = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return found.transpose(1, 2).view_as(x)


class ChannelFusion(nn.Module):
    """Channels of one map read those of another, by how alike they lie over the picture."""

    def __init__(self, width: int):
        super().__init__()
        self.v = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        a, b = (F.normalize(part.flatten(2).float(), dim=2) for part in (x, other))
        weights = (a @ b.transpose(1, 2)).softmax(-1).to(x.dtype)
        return (weights @ self.v(other).flatten(2)).view_as(x)


class MutualFusion(nn.Module):
    """Two maps of one shape, what each reads in the other, and their sum."""

    def __init__(self, width: int, inner: int, pooled: int):
        super().__init__()
        self.places = nn.ModuleList(PlaceFusion(width, inner, pooled) for _ in range(2))
        self.channels = nn.ModuleList(ChannelFusion(width) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, colour: Tensor, depth: Tensor) -> Tensor:
        pairs = ((colour, depth), (depth, colour))
        read = [place(x, y) + channel(x, y) for (x, y), place, channel in zip(pairs, self.places, self.channels)]
        return self.norm(colour + depth + read[0] + read[1])


class Cascade(nn.Module):
    """The joined maps of stages 2 to 4, deepest first: each is worked on by transformer blocks and enlarged onto the next."""

    recompute = False

    def __init__(self, widths: list[int], config: GlDmNetConfig):
        super().__init__()
        width = config.decoder_width
        self.narrow = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        rates = iter(drop_rates(config.drop_path, len(widths) * config.decoder_depth))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(width, config.decoder_heads, 4.0, drop_path=next(rates)) for _ in range(config.decoder_depth)
            )
            for _ in widths
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps ``(B, C, rows, cols)`` from the finest to the deepest → ``(B, D, rows, cols)`` of the finest."""
        found: Tensor | None = None
        for x, narrow, blocks in list(zip(maps, self.narrow, self.blocks))[::-1]:
            x = narrow(x)
            if found is not None:
                x = x + F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)
            tokens = x.flatten(2).transpose(1, 2)
            for block in blocks:  # type: ignore[union-attr]
                tokens = run(block, tokens, recompute=self.recompute)
            found = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        assert found is not None
        return found


class GlDmNet(nn.Module):
    """Colour and depth to a joined map of every stage."""

    recompute = False

    def __init__(self, config: GlDmNetConfig, num_stages: int):
        super().__init__()
        options: dict[str, Any] = {"layers": config.cnn_depths, "channels": config.cnn_channels}
        options = {key: value for key, value in options.items() if value is not None}
        self.streams = nn.ModuleList()
        for channels in (3, 1):
            cnn: Any = timm.create_model(config.cnn, pretrained=False, num_classes=0, in_chans=channels, **options)
            stem = nn.Sequential(cnn.conv1, cnn.bn1, cnn.act1, cnn.maxpool)
            widths = [int(info["num_chs"]) for info in cnn.feature_info][1:]
            stages = [getattr(cnn, f"layer{s}") for s in range(1, num_stages + 1)]
            self.streams.append(nn.ModuleList([stem, *stages]))
        self.fusions = nn.ModuleList(MutualFusion(w, config.inner, config.pooled) for w in widths[:num_stages])
        self.cascade = Cascade(widths[1:], config) if config.output == "decoded" else None
        if self.cascade is not None:
            self.cascade.apply(init_linear)
            self.fusions[0] = nn.Identity()  # stride 4 is finer than what is decoded

    def forward(self, colour: Tensor, depth: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` and ``(B, 1, H, W)`` → ``(B, C, rows, cols)`` of every stage."""
        learns = any(m.training for m in self.modules() if isinstance(m, BATCH_NORMS))
        again = self.recompute and not learns  # batch norms would count recomputed images twice
        maps: list[Tensor] = []
        x, y = self.streams[0][0](colour), self.streams[1][0](depth)  # type: ignore[index]
        for s, fusion in enumerate(self.fusions, 1):
            x = run(self.streams[0][s], x, recompute=again)  # type: ignore[index]
            y = run(self.streams[1][s], y, recompute=again)  # type: ignore[index]
            maps.append(x if isinstance(fusion, nn.Identity) else run(fusion, x, y, recompute=again))
        return maps


class GlDmNetEncoder(BackboneEncoder):
    """Pictures with depth: a colour panel over a depth panel (`mllm.processing.panels`), on one grid."""

    Config: ClassVar[type[EncoderConfig]] = GlDmNetConfig
    config: GlDmNetConfig
    model: GlDmNet

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"cnn_depths": [1, 1, 1, 1], "cnn_channels": [8, 8, 16, 16], "inner": 8, "pooled": 4}
        decoder = {"output": "decoded", "decoder_width": 16, "decoder_heads": 2}
        return {"type": "gldmnet", "cnn": "resnet18", **sizes, **decoder, "image_size": [32, 64]}

    @classmethod
    def build(cls, config: GlDmNetConfig) -> GlDmNet:
        if config.output == "decoded" and config.layers != [-1]:
            raise ConfigError("layers: decoded maps come from all stages; layers is [-1], or set output: fused")
        if config.decoder_width % config.decoder_heads:
            raise ConfigError(
                f"decoder_heads: {config.decoder_heads} do not divide decoder_width {config.decoder_width}"
            )
        if config.info is not None:
            image = config.info.image
            require_multiple(image.model_copy(update={"height": image.height // 2}), 32, "stages halve the map exactly")
        return GlDmNet(config, max(take_layers(config.layers, _STAGES, lowest=1)))

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        model = self.model
        model.recompute = self.recompute
        planes = planes_of(pixels, 2)
        maps = model(planes[:, :3], planes[:, 3:].mean(1, keepdim=True))
        if model.cascade is not None:
            model.cascade.recompute = self.recompute
            chosen = [model.cascade(maps[1:])]
        else:
            chosen = [maps[count - 1] for count in take_layers(self.config.layers, _STAGES, lowest=1)]
        return [LayerOutput(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])) for x in chosen]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """A stage of both streams with its fusion is a layer; the cascade is the last group."""
        stages = range(1, len(self.model.fusions) + 1)
        groups = [("embeddings", ["model.streams.0.0.", "model.streams.1.0."])]
        for s in stages:
            own = [f"model.streams.0.{s}.", f"model.streams.1.{s}.", f"model.fusions.{s - 1}."]
            groups.append((f"layers.{s - 1}", own))
        return [*groups, ("norm", ["model.cascade."])] if self.model.cascade is not None else groups
