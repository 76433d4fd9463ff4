"""How are pictures of one scene given to an encoder that sees them together, and how in parts where there are many?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import ImageEncoderConfig, LayerOutput, LibraryEncoder, merge_layers, tiles_alone
from mllm.encoders.weights import local_path, read_weights, strip_prefix, unavailable
from mllm.errors import ConfigError
from mllm.types import Grid, VisionFeatures


class ViewsConfig(ImageEncoderConfig):
    """Settings of an encoder that sees the views of a scene together."""

    patch_size: int = Field(default=14, gt=0)
    chunk: int | None = Field(default=None, ge=2)
    """Most views that see each other at once: a longer scene is encoded in parts, its first view (the reference) at the head of each, so
    that memory does not grow with the scene. Views of unlike parts then meet in the reference alone."""


def _prefix(output: LayerOutput) -> Tensor:
    """Camera and register tokens of a layer, which every layer here has."""
    assert output.prefix is not None
    return output.prefix


def _joined(parts: Sequence[LayerOutput]) -> LayerOutput:
    """One layer of all views from that of their parts."""
    return LayerOutput(
        torch.cat([part.tokens for part in parts]), parts[0].grid, torch.cat([_prefix(part) for part in parts])
    )


class ViewsEncoder(LibraryEncoder):
    """Multi-view features: images with the same ``scene_ids`` see one another; without ids every image is a scene of its own."""

    Config: ClassVar[type[EncoderConfig]] = ViewsConfig
    config: ViewsConfig
    joins_views: ClassVar[bool] = True
    _tensors: dict[str, Tensor] | None = None

    @classmethod
    def check_sizes(cls, config: ViewsConfig, width: int, num_heads: int) -> None:
        """Raise `ConfigError` where patches do not fill the image or heads the width. config: with `info`."""
        image, size = config.resolved_info.image, config.patch_size
        if image.height % size or image.width % size:
            raise ConfigError(f"image_size: ({image.height}, {image.width}) is no multiple of the patch size {size}")
        if width % (4 * num_heads):
            raise ConfigError(f"num_heads: {num_heads} does not split width {width} into multiples of 4")

    def read_views(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        """Outputs of ``config.layers`` of whole scenes, whose views lie side by side; ``views``: how many each has."""
        raise NotImplementedError

    def seen(self, pixels: Tensor, given: VisionFeatures | None) -> Tensor:
        """What `read_views` is given of views: their pixels, or what the encoder reads in place of them."""
        return pixels

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        places: Tensor | None = None,
        return_attention: bool = False,
        given: VisionFeatures | None = None,
    ) -> VisionFeatures:
        """places ``(B, 2)``: a tile (not (-1, -1)) shows a part of a picture from where the whole is seen, so it is a scene of its
        own; frames of a video are whole, and one scene. given: what is read in place of ``pixels``, a row for each, where
        ``config.reads`` names an encoder."""
        pixels = self.without_attention(pixels, return_attention)
        if pixels.shape[0] == 0:
            return self.empty_features(pixels)
        pixels = self.seen(pixels, given)
        if scene_ids is None:
            return merge_layers(self._read(pixels, [1] * pixels.shape[0]), self.config.keep_prefix)
        scene_ids = tiles_alone(scene_ids, places)
        order = scene_ids.argsort(stable=True)
        views = torch.unique_consecutive(scene_ids[order], return_counts=True)[1].tolist()
        if bool((order[1:] > order[:-1]).all()):  # as a model gives them: nothing is copied
            return merge_layers(self._read(pixels, views), self.config.keep_prefix)
        features = merge_layers(self._read(pixels[order], views), self.config.keep_prefix)
        back = order.argsort()
        features.tokens = features.tokens[back]
        features.prefix = features.prefix[back] if features.prefix is not None else None
        return features

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        return self._read(self.seen(pixels, None), [1] * pixels.shape[0])

    @property
    def own_grid(self) -> Grid:
        """Rows and columns of its patches."""
        image, size = self.config.resolved_info.image, self.config.patch_size
        return (image.height // size, image.width // size)

    def _read(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        chunk = self.config.chunk
        if chunk is None or max(views) <= chunk:
            return self.read_views(pixels, views)
        parts = [part for scene in pixels.split(views) for part in self._read_in_parts(scene, chunk)]
        return [_joined(layers) for layers in zip(*parts, strict=True)]

    def _read_in_parts(self, scene: Tensor, chunk: int) -> list[list[LayerOutput]]:
        """Layers of each part of a scene ``(S, 3, H, W)``; the reference's of the first part alone."""
        parts = [self.read_views(scene[:chunk], [min(chunk, len(scene))])]
        for rest in scene[chunk:].split(chunk - 1):
            found = self.read_views(torch.cat([scene[:1], rest]), [1 + len(rest)])
            parts.append([LayerOutput(one.tokens[1:], one.grid, _prefix(one)[1:]) for one in found])
        return parts

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.model.gradient_checkpointing = enabled

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """The weights' file is read once for all that asks `published` inside."""
        before = self._tensors
        self._tensors = self._file() if before is None else before
        try:
            yield
        finally:
            self._tensors = before

    def published(self, wanted: set[str]) -> tuple[str, dict[str, Tensor]]:
        """Where ``config.weights`` are from, and their tensors below the prefix under which most of ``wanted`` is."""
        source = self.required_weights().source
        return source, strip_prefix(self._file() if self._tensors is None else self._tensors, wanted)

    def _file(self) -> dict[str, Tensor]:
        weights = self.required_weights()
        path = local_path(weights.source)
        if path is None:
            from huggingface_hub import hf_hub_download

            try:
                path = hf_hub_download(weights.source, "model.safetensors", revision=weights.revision)
            except Exception as error:
                raise unavailable(weights.source, error) from error
        return read_weights(local_path(str(path)) or path)  # type: ignore[arg-type]
