"""What happens in a clip, by a ViT that reads all of its frames at once (ViViT, arXiv 2103.15691)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.hf import HfConfig, HfEncoder
from mllm.encoders.hf_models import vision_config
from mllm.encoders.library import LayerOutput, check_pixels, merge_layers
from mllm.errors import ConfigError, UnavailableError
from mllm.types import Grid, VisionFeatures


class VivitEncoderConfig(HfConfig):
    """``architecture: {model_type: vivit, num_frames, tubelet_size: [frames, rows, columns], …}`` of transformers."""

    def check_frames(self, frames: int, name: str) -> None:
        clip = vision_config(self.known_architecture).num_frames
        if frames > clip:
            raise ConfigError(
                f"model.encoders.{name}: its clips have {clip} frames, and a video has up to {frames}; add model.video.fewer: "
                f"{{{name}: {clip}}} or lower model.video.frames (or max_frames)"
            )


class VivitEncoder(HfEncoder):
    """The frames of a visual are one clip of ``num_frames``; every frame is given the tokens of the tubelet that it lies in.

    A shorter video is spread over the clip, each frame as often as its share (a picture: in every place, as MERV does); a longer one is
    refused.
    """

    Config: ClassVar[type[EncoderConfig]] = VivitEncoderConfig
    config: VivitEncoderConfig
    joins_views = True

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        clip = {"model_type": "vivit", "image_size": 16, "num_frames": 4, "tubelet_size": [2, 4, 4]}
        return {"type": "vivit", "architecture": {**clip, **sizes}}

    @classmethod
    def build(cls, config: VivitEncoderConfig) -> nn.Module:  # type: ignore[override]
        full = vision_config(config.known_architecture)
        if full.model_type != "vivit":
            raise ConfigError(f"architecture.model_type: {full.model_type!r} reads no clips; type vivit takes vivit")
        frames, rows, columns = full.tubelet_size
        image = config.resolved_info.image
        if image.height != image.width:
            raise ConfigError(f"image_size: ({image.height}, {image.width}) is not square, as ViViT's positions are")
        if image.height % rows or image.width % columns or full.num_frames % frames:
            raise ConfigError(
                f"architecture.tubelet_size: {list(full.tubelet_size)} does not divide {full.num_frames} frames of "
                f"{image.height} × {image.width} pixels"
            )
        return super().build(config)

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        places: Tensor | None = None,
        return_attention: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> VisionFeatures:
        if grids is not None:
            raise ConfigError("vivit encoder: takes frames of one size, not patches of any grid (views native)")
        if return_attention:
            raise UnavailableError("return_attention: a vivit encoder's attention is between the frames of a clip")
        check_pixels(pixels, self.config.resolved_info.image, self.config.type)
        pixels = pixels.to(self.dtype)
        if not len(pixels):
            return self.empty_features(pixels)
        lengths = [1] * len(pixels)
        if scene_ids is not None:
            lengths = torch.unique_consecutive(scene_ids.cpu(), return_counts=True)[1].tolist()
        return merge_layers(self._read_clips(pixels, lengths), self.config.keep_prefix)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        return self._read_clips(pixels, [1] * len(pixels))

    def _read_clips(self, pixels: Tensor, lengths: Sequence[int]) -> list[LayerOutput]:
        """lengths: how many successive rows of the pixels each visual has."""
        architecture = self.model.config
        count, tubelet = architecture.num_frames, architecture.tubelet_size[0]
        if max(lengths) > count:
            raise ConfigError(
                f"vivit encoder: its clips have {count} frames, and a video has {max(lengths)}; give it fewer (model.video.fewer: "
                f"{{its name: {count}}}) or lower model.video.frames"
            )
        shown = [k * length // count for length in lengths for k in range(count)]
        starts = [sum(lengths[:n]) for n in range(len(lengths)) for _ in range(count)]
        rows = torch.tensor([start + k for start, k in zip(starts, shown)], device=pixels.device)
        grid = tuple(side // cell for side, cell in zip(pixels.shape[2:], architecture.tubelet_size[1:]))
        captured = self._run(pixels[rows].unflatten(0, (len(lengths), count)))
        # Row r is given the mean of the tubelets that it lies in, by how many of its places each holds.
        share = torch.zeros(len(pixels), len(lengths) * count // tubelet, device=pixels.device)
        tubelets = torch.arange(len(rows), device=pixels.device) // tubelet
        share.index_put_((rows, tubelets), torch.ones(len(rows), device=pixels.device), accumulate=True)
        share = (share / share.sum(1, keepdim=True)).to(self.dtype)
        owners = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], device=pixels.device)
        layers = {}
        for number in set(self._counts):
            tokens = captured[f"layer {number}"]
            if number == self._depth and self.config.final_norm:
                tokens = self._apply_final_norm(tokens)
            maps = tokens[:, 1:].unflatten(1, (count // tubelet, -1)).flatten(0, 1)
            spread = (share @ maps.flatten(1)).unflatten(1, tuple(maps.shape[1:]))
            layers[number] = LayerOutput(spread, (grid[0], grid[1]), tokens[owners, :1])
        return [layers[number] for number in self._counts]
