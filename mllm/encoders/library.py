"""What do the adapters around open_clip, timm and transformers have in common?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.encoders.shapes import OnlyShapes
from mllm.encoders.weights import recompute_buffers
from mllm.errors import CheckpointError, ConfigError, MllmError, UnavailableError
from mllm.types import EncoderInfo, Grid, ImageSpec, VisionFeatures


class ImageEncoderConfig(EncoderConfig):
    """Settings of every adapter: what the pretrained preprocessing says, unless written here."""

    image_size: int | tuple[int, int] | None = None
    """Pixels, one number or (height, width). Default: what the weights were trained with. Position embeddings are
    resized."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: Literal["squash", "letterbox", "crop"] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] | None = None

    def image(self, default: ImageSpec) -> ImageSpec:
        """``default`` with what this config overrides."""
        size = self.image_size if self.image_size is not None else (default.height, default.width)
        height, width = (size, size) if isinstance(size, int) else size
        return ImageSpec(
            height=height,
            width=width,
            mean=self.mean or default.mean,
            std=self.std or default.std,
            resize=self.resize or default.resize,
            interpolation=self.interpolation or default.interpolation,
            patch=default.patch,
        )


@dataclass
class LayerOutput:
    """Features of one layer: tokens ``(B, N, D)`` in raster order, prefix ``(B, P, D)`` or None."""

    tokens: Tensor
    grid: Grid
    prefix: Tensor | None = None


def map_to_tokens(feature_map: Tensor) -> LayerOutput:
    """``(B, D, rows, cols)`` → tokens."""
    return LayerOutput(feature_map.flatten(2).transpose(1, 2), (feature_map.shape[2], feature_map.shape[3]))


def take_layers(layers: Sequence[int], depth: int, *, lowest: int = 0) -> list[int]:
    """Positions like HF hidden states → how many blocks have run (0: the embeddings, ``depth``: all), in the same
    order.

    Raises `ConfigError` for a layer that does not exist, or lies below ``lowest``.
    """
    counts = []
    for layer in layers:
        count = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= count <= depth:
            raise ConfigError(
                f"layers: {layer} does not exist; the encoder has {depth} blocks, so {-depth - 1} to {depth}"
            )
        if count < lowest:
            raise ConfigError(
                f"layers: {layer} is the embeddings before the first block, which this library does not hand out"
            )
        counts.append(count)
    return counts


def merge_layers(outputs: Sequence[LayerOutput], keep_prefix: bool) -> VisionFeatures:
    """Concatenate layers on channels. Layers of other resolutions (stages of a hierarchical model) are brought to the
    grid of the last one: bilinear, fp32, pixel centres aligned (``align_corners=False``)."""
    grid = outputs[-1].grid
    tokens = [out.tokens if out.grid == grid else resample_tokens(out.tokens, out.grid, grid) for out in outputs]
    prefix = None
    if keep_prefix and all(out.prefix is not None for out in outputs):
        prefix = torch.cat([out.prefix for out in outputs if out.prefix is not None], dim=-1)
    return VisionFeatures(tokens=tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1), grid=grid, prefix=prefix)


def resample_tokens(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """tokens ``(B, old rows * cols, D)`` → ``(B, new rows * cols, D)``, bilinear in fp32."""
    feature_map = tokens.transpose(1, 2).unflatten(2, old)
    resized = F.interpolate(feature_map.float(), size=new, mode="bilinear", align_corners=False)
    return resized.to(tokens.dtype).flatten(2).transpose(1, 2)


def find_blocks(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Path and container of the numbered blocks: the list that holds most parameters, the outermost where lists
    nest."""
    best: tuple[str, nn.Module | None] = ("", None)
    most = 0
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_children()]
        if not path or not names or not all(name.isdigit() for name in names):
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            best, most = (path, module), size
    return best


def block_prefixes(model: nn.Module) -> list[str]:
    """Parameter-name prefixes of the blocks in order: ``blocks.0.`` …, or ``layer1.`` … of residual networks."""
    stages = [name for name, _ in model.named_children() if re.fullmatch(r"(layer|stage)_?\d+", name)]
    if len(stages) > 1:
        return [f"{name}." for name in stages]
    path, blocks = find_blocks(model)
    return [f"{path}.{name}." for name, _ in blocks.named_children()] if blocks is not None else []


def group_parameters(names: Sequence[str], blocks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`VisionEncoder.layer_groups` from the parameter names in order of definition and the blocks' prefixes.

    What is defined before the first block is ``embeddings``, everything else outside the blocks is ``norm``.
    """
    blocks = [block for block in blocks if any(name.startswith(block) for name in names)]
    outside = [(i, name) for i, name in enumerate(names) if not name.startswith(tuple(blocks))]
    first = next((i for i, name in enumerate(names) if name.startswith(tuple(blocks))), len(names))
    groups = [
        ("embeddings", [name for i, name in outside if i < first]),
        *((f"layers.{i}", [block]) for i, block in enumerate(blocks)),
        ("norm", [name for i, name in outside if i > first]),
    ]
    return [(name, prefixes) for name, prefixes in groups if prefixes]


_MEASURED: dict[tuple, EncoderInfo] = {}
"""What each config was measured to give: recipes name the same encoders again and again, and a pass takes seconds."""


class LibraryEncoder(VisionEncoder):
    """An encoder built by a library. Subclasses say how to build it and how to read its layers; sizes are measured by a
    forward pass on the meta device, so `describe` cannot disagree with `forward`."""

    Config: ClassVar[type[EncoderConfig]] = ImageEncoderConfig
    config: ImageEncoderConfig
    model: Any
    """The library's `nn.Module`."""

    def __init__(self, config: ImageEncoderConfig):
        if config.info is None:
            config = self.resolve(config)
        super().__init__(config)
        self.model = self.build(config)
        if torch.get_default_dtype() != torch.float32 and not any(p.is_meta for p in self.model.parameters()):
            self.restore_buffers()  # positions computed in bf16 would be wrong in the third digit

    @classmethod
    def complete(cls, config: ImageEncoderConfig) -> Any:
        """The config with names replaced by data (architectures read from files or hubs). May read; loads no
        weights."""
        return config

    @classmethod
    def default_image(cls, config: ImageEncoderConfig) -> ImageSpec:
        """The pretrained preprocessing of a completed config."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: ImageEncoderConfig) -> nn.Module:
        """The library's model without weights, cut after the deepest block that is needed."""
        raise NotImplementedError

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        """Outputs of ``config.layers``, in that order."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, config: ImageEncoderConfig) -> Any:
        config = cls.complete(config)
        image = config.image(cls.default_image(config))
        same = (cls, image.model_dump_json(), config.model_dump_json(exclude={"info"}))
        if same not in _MEASURED:
            _MEASURED[same] = cls._measure(config, image)
        return config.model_copy(update={"info": _MEASURED[same]})

    @classmethod
    def _measure(cls, config: ImageEncoderConfig, image: ImageSpec) -> EncoderInfo:
        unknown = EncoderInfo(image=image, grid=(1, 1), width=1)
        with torch.device("meta"), OnlyShapes(), torch.no_grad():
            with _as_config_error("architecture: this encoder does not build"):
                encoder = cls(config.model_copy(update={"info": unknown})).eval()
            pixels = torch.zeros(1, image.channels, image.height, image.width, dtype=encoder.dtype)
            with _as_config_error(f"image_size: this encoder does not run on {image.height} x {image.width} pixels"):
                features = merge_layers(encoder.read_layers(pixels), config.keep_prefix)
        if features.tokens.shape[1] != features.grid[0] * features.grid[1]:
            raise ConfigError(
                f"architecture: its {features.tokens.shape[1]} tokens do not form the {features.grid} grid; this "
                "layout is not supported"
            )
        if config.keep_prefix and features.prefix is None:
            raise ConfigError("keep_prefix: this encoder has no class or register tokens; remove the key")
        return EncoderInfo(
            image=image,
            grid=features.grid,
            width=features.tokens.shape[2],
            num_prefix_tokens=features.prefix.shape[1] if features.prefix is not None else 0,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        return_attention: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> VisionFeatures:
        info = self.config.resolved_info
        if grids is not None:
            check_patches(pixels, grids, info.image, self.config.type)
            return self.read_native(pixels.to(self.dtype), grids)
        check_pixels(pixels, info.image, self.config.type)
        pixels = pixels.to(self.dtype)
        if pixels.shape[0] == 0:
            return self.empty_features(pixels, return_attention=return_attention)
        if return_attention:
            outputs, attention = self.read_layers_and_attention(pixels)
        else:
            outputs, attention = self.read_layers(pixels), None
        features = merge_layers(outputs, self.config.keep_prefix)
        features.attention = attention
        return features

    def read_native(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Features of images that have grids of their own, from patches ``(ΣN, 3 p²)``. Images with the same one run as one batch;
        none is padded."""
        counts = [rows * columns for rows, columns in grids]
        parts, found = patches.split(counts), [patches[:0]] * len(grids)
        side = self.config.resolved_info.image.patch
        assert side is not None, "an encoder that is given patches has a patch size"
        for grid in dict.fromkeys(grids):
            members = [number for number, other in enumerate(grids) if other == grid]
            pixels = from_patches(torch.cat([parts[m] for m in members]), grid, side)
            for member, tokens in zip(members, merge_layers(self.read_layers(pixels), False).tokens):
                found[member] = tokens
        tokens = torch.cat(found)[None] if found else patches.new_zeros(1, 0, self.config.resolved_info.width)
        return VisionFeatures(tokens, (1, tokens.shape[1]), grids=tuple(grids))

    def read_layers_and_attention(self, pixels: Tensor) -> tuple[list[LayerOutput], Tensor]:
        """`read_layers` and the attention of the deepest block that runs."""
        raise UnavailableError(
            f"return_attention: type {self.config.type} uses fused attention, which hands out no weights; use the same "
            "weights through type: hf"
        )

    def without_attention(self, pixels: Tensor, return_attention: bool) -> Tensor:
        """``(B, channels, H, W)`` in the encoder's dtype (with cameras, which would be rounded, as they are), for a ``forward`` that hands
        out no attention. Raises `UnavailableError` where it is asked for, `ConfigError` for pixels of another size."""
        if return_attention:
            raise UnavailableError(
                f"return_attention: {self.config.type} uses fused attention, which hands out no weights"
            )
        image = self.config.resolved_info.image
        check_pixels(pixels, image, self.config.type)
        return pixels if image.cameras else pixels.to(self.dtype)

    def empty_features(self, pixels: Tensor, *, return_attention: bool = False) -> VisionFeatures:
        """The features of no images."""
        info = self.config.resolved_info
        count = info.num_prefix_tokens
        prefix = pixels.new_zeros(0, count, info.width) if count else None
        return VisionFeatures(pixels.new_zeros(0, info.grid[0] * info.grid[1], info.width), info.grid, prefix)

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        blocks = [f"model.{prefix}" for prefix in block_prefixes(self.model)]
        return group_parameters([name for name, _ in self.named_parameters()], blocks)

    def restore_buffers(self) -> None:
        recompute_buffers(self.model, lambda: self.build(self.config))

    def required_weights(self) -> Any:
        """``config.weights``. Raises `CheckpointError` where none is named."""
        if self.config.weights is None:
            raise CheckpointError(
                f"{self.config.type} encoder: no weights named; add weights: {{source: …}} to its config"
            )
        return self.config.weights


@contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    """What a library raises about its own settings becomes a `ConfigError` that starts with ``what``."""
    try:
        yield
    except MllmError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{what} ({' '.join(str(error).split())[:300]})") from error


def check_patches(patches: Tensor, grids: Sequence[Grid], image: ImageSpec, where: str) -> None:
    """Raise `ConfigError` unless patches are ``(ΣN, 3 p²)`` for images of these grids."""
    side, count = image.patch, sum(rows * columns for rows, columns in grids)
    if side is None:
        raise ConfigError(f"{where} encoder: takes {image.height} × {image.width} pixels only, not patches of any grid")
    if tuple(patches.shape) != (count, 3 * side * side):
        raise ConfigError(
            f"{where} encoder: expected patches ({count}, {3 * side * side}) for {len(grids)} images, got {tuple(patches.shape)}"
        )


def to_patches(pixels: Tensor, side: int) -> Tensor:
    """Pixels ``(B, 3, rows · p, columns · p)`` → patches ``(B · rows · columns, 3 p²)``, each channel by channel."""
    cells = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, pixels.shape[1] * side * side)


def from_patches(patches: Tensor, grid: Grid, side: int) -> Tensor:
    """Patches ``(B · rows · columns, 3 p²)``, each channel by channel → pixels ``(B, 3, rows · p, columns · p)``."""
    cells = patches.reshape(-1, *grid, 3, side, side)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, grid[0] * side, grid[1] * side)


def tiles_alone(scene_ids: Tensor, places: Tensor | None) -> Tensor:
    """Scenes ``(B,)`` in which every tile is one of its own. places ``(B, 2)``: (-1, -1) where a whole picture is seen."""
    if places is None:
        return scene_ids
    alone = torch.arange(len(scene_ids), device=scene_ids.device) + int(scene_ids.max()) + 1
    return torch.where(places.ge(0).any(dim=-1), alone, scene_ids)


def check_pixels(pixels: Tensor, image: ImageSpec, where: str) -> None:
    """Raise `ConfigError` unless pixels are ``(B, image.channels, image.height, image.width)``."""
    channels = image.channels
    if pixels.ndim == 4 and tuple(pixels.shape[1:]) == (channels, image.height, image.width):
        return
    got = (
        f"{where} encoder: expected pixels (B, {channels}, {image.height}, {image.width}), got {tuple(pixels.shape)}; "
    )
    if channels != 3 and pixels.ndim == 4 and pixels.shape[1] == 3:
        raise ConfigError(
            f"{got}the last channel tells cameras (known: [cameras]): make pixels by the model's own processor"
        )
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        raise ConfigError(f"{got}repeat the one channel for red, green and blue: pixels.expand(-1, 3, -1, -1)")
    if pixels.ndim == 4 and pixels.shape[1] != 3:
        raise ConfigError(f"{got}choose three of the {pixels.shape[1]} channels, or an encoder of type channelvit")
    if pixels.ndim == 3:
        raise ConfigError(f"{got}add the batch in front: pixels[None]")
    raise ConfigError(f"{got}resize images to the encoder's own ImageSpec, or set its image_size")


def convolution_layout(pixels: Tensor) -> Tensor:
    """The same pixels, on CUDA with channels last: there cuDNN's bf16 convolutions need no copy of every map before and after them, and
    maps keep the layout of what they are made from. One H200, EfficientNet-Lite0 at 448 × 448, batch 32, forward and backward: 27.6
    instead of 52.3 ms."""
    return pixels.contiguous(memory_format=torch.channels_last) if pixels.is_cuda else pixels
