"""How does SAM-UNet's decoder turn prompts and maps of several of SAM's blocks into masks (arXiv 2408.09886)?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamLayerNorm, SamTwoWayTransformer

from mllm.heads.segmentation.sam import SamDecoder, SamSizes


class SamUnetDecoderConfig(SamSizes):
    """SAM-UNet's decoder: one token, no choice of masks, and a fine map of the encoder's global blocks. The encoder is ``samunet`` with
    ``layers: [1, 2, 3, -1]`` and ``final_norm: true``."""

    type: Literal["sam_unet"] = "sam_unet"
    bridges: list[int] = Field(default=[768, 768, 768])
    """Widths of the maps that come before the neck's in the encoder's features, each of which gets a bridge; none: []."""

    @property
    def features_width(self) -> int:
        return sum(self.bridges) + self.width

    @property
    def advice(self) -> str:
        return "A samunet encoder gives them with layers: [1, 2, 3, -1] and final_norm: true; name the first three widths in bridges"


class SamUnetDecoder(SamDecoder):
    """Prompts and features → logits. Its weights are the authors' but for the prompt encoder's, which are SAM's."""

    without_gradient: tuple[str, ...] = ()
    config: SamUnetDecoderConfig

    def build_decoder(self, config: SamUnetDecoderConfig, sizes: SamMaskDecoderConfig) -> nn.Module:
        width = config.width
        self.embedding_encoder = _raise(width, width // 4, width // 8)
        self.adapters_bridge = nn.ModuleList(_raise(before, width, width // 8) for before in config.bridges)
        return SingleTokenDecoder(width, sizes)

    def answer(
        self, prompts: Tensor, image: Tensor, *, multimask: bool = False, dense: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `SamDecoder.answer`, of features ``(1, bridges + C, h, w)``. The decoder does not say how well it does."""
        *blocks, neck = image.split([*self.config.bridges, self.config.width], 1)
        dense = self.no_mask() if dense is None else dense
        masks = self.mask_decoder(
            self.as_prompts(prompts)[0], neck + dense, self.image_positions().to(image), self.multi_scale(blocks, neck)
        )
        return masks, None

    def multi_scale(self, blocks: list[Tensor] | tuple[Tensor, ...], neck: Tensor) -> Tensor:
        """Maps of the global blocks and the neck's → their sum at four times the grid ``(B, C / 8, 4h, 4w)``."""
        found = self.embedding_encoder(neck)
        for bridge, block in zip(self.adapters_bridge, blocks, strict=True):
            found = found + bridge(block)
        return found

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names as they are here; SAM's own tokens and heads are there and unused."""
        unused = ("iou_token", "mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
        found = {}
        for name, value in tensors.items():
            if ".sam_mask_decoder." in name and any(part in name for part in unused):
                continue
            name = name.replace("mask_decoder.sam_mask_decoder.", "mask_decoder.")
            if len(self.adapters_bridge) == 1 and name.startswith("adapters_bridge.") and name.count(".") == 2:
                name = name.replace("adapters_bridge.", "adapters_bridge.0.")
            for number, present in enumerate(("proj_in", "layers.0", "proj_out")):
                name = name.replace(f"hf_mlp.layers.{number}.", f"hf_mlp.{present}.")
            found[name] = value
        return super().translated(found)


class SingleTokenDecoder(nn.Module):
    """SAM's two-way transformer and upscaling with one learned token before the prompts."""

    def __init__(self, width: int, sizes: SamMaskDecoderConfig):
        super().__init__()
        self.transformer: Any = SamTwoWayTransformer(sizes)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, 2, stride=2)
        self.upscale_layer_norm = _norm(width // 4)
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2)
        self.med_token = nn.Embedding(1, width)
        self.hf_mlp = SamFeedForward(width, width, width // 8, 3)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(width // 8, width // 4, 3, padding=1),
            _norm(width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 8, 3, padding=1),
        )

    def forward(self, prompts: Tensor, image: Tensor, positions: Tensor, fine: Tensor) -> Tensor:
        """prompts ``(N, P, C)``; image ``(1 or N, C, h, w)``; fine ``(1, C / 8, 4h, 4w)`` → logits ``(N, 1, 4h, 4w)``."""
        count = len(prompts)
        tokens = torch.cat([self.med_token.weight.expand(count, 1, -1), prompts.to(self.med_token.weight.dtype)], 1)
        states, keys = self.transformer(
            point_embeddings=tokens[:, None],
            image_embeddings=image.expand(count, -1, -1, -1),
            image_positional_embeddings=positions.expand(count, -1, -1, -1),
            attention_similarity=None,
        )
        maps = keys[:, 0].transpose(1, 2).unflatten(2, image.shape[2:])
        maps = nn.functional.gelu(self.upscale_layer_norm(self.upscale_conv1(maps)))
        maps = nn.functional.gelu(self.upscale_conv2(maps))
        maps = self.embedding_maskfeature(maps) + fine
        return torch.einsum("nc,nchw->nhw", self.hf_mlp(states[:, 0, 0]), maps)[:, None]


def _norm(width: int) -> nn.Module:
    """Of the channels of a map ``(B, width, h, w)``."""
    return SamLayerNorm(width, eps=1e-6, data_format="channels_first")


def _raise(before: int, middle: int, after: int) -> nn.Sequential:
    """``(B, before, h, w)`` → ``(B, after, 4h, 4w)``."""
    return nn.Sequential(
        nn.ConvTranspose2d(before, middle, 2, stride=2),
        _norm(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, after, 2, stride=2),
    )
