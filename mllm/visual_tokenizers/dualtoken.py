"""How does DualToken write an image: pixel and semantic codes from an early and a late layer of one encoder?"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.encoders.weights import shorten
from mllm.errors import CheckpointError
from mllm.noise import load_report_unless_told
from mllm.types import Grid, VisualCodes, WeightsSource
from mllm.visual_tokenizers.base import (
    TokenizerOutput,
    VisualTokenizer,
    VisualTokenizerConfig,
    pixel_spec,
    sum_losses,
    tag_usage,
    to_map,
)
from mllm.visual_tokenizers.networks.convolution import ConvolutionalDecoder, ConvolutionConfig, ResidualBlock
from mllm.visual_tokenizers.networks.transformer import AttentionProjection
from mllm.visual_tokenizers.quantizers import QuantizerField, QuantizerOutput, build_quantizer


class DualTokenConfig(VisualTokenizerConfig):
    """DualToken (arXiv 2503.14324) on a SigLIP vision model. Layers are numbered by how many blocks came before."""

    type: str = "dualtoken"
    vision: dict[str, Any]
    """`SiglipVisionConfig` fields: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, image_size,
    patch_size …"""
    weights: WeightsSource | None = None
    """Where the vision model's published weights come from; None: from scratch."""
    layer_pixel: int = Field(ge=1)
    layer_shortcut: int | None = Field(default=None, ge=1)
    """An earlier layer whose projection is added to the pixel feature."""
    shortcut_weight: float = 0.6
    layer_semantic: int = Field(ge=1)
    """The semantic codes replace this layer's output; the layers after it run on them."""
    pixel_quantizer: QuantizerField
    semantic_quantizer: QuantizerField
    decoder: ConvolutionConfig = Field(default_factory=lambda: ConvolutionConfig(multipliers=(1, 1, 4, 4, 8)))
    decoder_channels: int = Field(default=1024, ge=1)
    decoder_grid: Grid
    """The pixel map is resized (bilinear) to this before decoding; times the decoder's factor it is the image."""

    @model_validator(mode="after")
    def _layers(self) -> DualTokenConfig:
        layers = int(self.vision.get("num_hidden_layers", 12))
        if not self.layer_pixel <= self.layer_semantic <= layers:
            raise ValueError(
                f"layer_pixel {self.layer_pixel} ≤ layer_semantic {self.layer_semantic} ≤ {layers} layers must hold"
            )
        if self.layer_shortcut is not None and self.layer_shortcut > self.layer_semantic:
            raise ValueError(f"layer_shortcut {self.layer_shortcut} lies after layer_semantic {self.layer_semantic}")
        size = int(self.vision.get("image_size", 224))
        made = tuple(side * self.decoder.factor for side in self.decoder_grid)
        if made != (size, size):
            raise ValueError(f"decoder_grid × {self.decoder.factor} is {made[0]}×{made[1]}, the image is {size}×{size}")
        return self


class DualToken(VisualTokenizer):
    """Two codebooks, ``pixel`` and ``semantic``, on one grid, several codes per position in each."""

    name = "dualtoken"
    Config = DualTokenConfig
    config: DualTokenConfig

    def __init__(self, config: DualTokenConfig):
        super().__init__(config)
        from transformers import SiglipVisionConfig, SiglipVisionModel

        vision: Any = SiglipVisionConfig(**config.vision)
        model: Any = SiglipVisionModel(vision)
        # Named here one by one: transformers moved these modules between versions, our weights' names stay.
        core = getattr(model, "vision_model", model)
        self.embeddings, self.layers = core.embeddings, core.encoder.layers
        self.post_norm, self.head = core.post_layernorm, core.head
        width, side = vision.hidden_size, vision.image_size // vision.patch_size
        self.width = width
        self.image, self.grid = pixel_spec(vision.image_size), (side, side)
        self.pixel_quantizer = build_quantizer(config.pixel_quantizer)
        self.semantic_quantizer = build_quantizer(config.semantic_quantizer)
        quantizers = {"pixel": self.pixel_quantizer, "semantic": self.semantic_quantizer}
        self.codebooks = {name: (q.size, q.num_codes) for name, q in quantizers.items()}
        pixel_dim, semantic_dim = self.pixel_quantizer.dim, self.semantic_quantizer.dim
        self.pixel_down = AttentionProjection(width, pixel_dim, width // pixel_dim)
        shortcut = config.layer_shortcut is not None
        self.shortcut_down = AttentionProjection(width, pixel_dim, width // pixel_dim) if shortcut else None
        self.semantic_down = AttentionProjection(width, semantic_dim, width // semantic_dim)
        self.pixel_up = AttentionProjection(pixel_dim, width, width // pixel_dim, causal=True)
        self.semantic_up = AttentionProjection(semantic_dim, width, width // semantic_dim, causal=True)
        self.from_codes = ResidualBlock(width, config.decoder_channels, config.decoder.groups, first_kernel=1)
        self.decoder = ConvolutionalDecoder(config.decoder, config.decoder_channels)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
        residual = {"type": "residual", "size": 16, "dim": 8, "depth": 2}
        return {
            "type": "dualtoken",
            "vision": {**vision, "image_size": 16, "patch_size": 4},
            "layer_pixel": 1,
            "layer_semantic": 2,
            "pixel_quantizer": residual,
            "semantic_quantizer": residual,
            "decoder": {"channels": 16, "multipliers": [1, 2], "num_res_blocks": 1, "groups": 8},
            "decoder_channels": 32,
            "decoder_grid": [8, 8],
        }

    @property
    def embed_dims(self) -> dict[str, int]:
        return {"pixel": self.pixel_quantizer.dim, "semantic": self.semantic_quantizer.dim}

    @load_report_unless_told()
    def load_pretrained(self) -> None:
        weights = self.config.weights
        if weights is None:
            return
        from transformers import SiglipVisionModel

        options: Any = {"revision": weights.revision or "main", "output_loading_info": True}
        try:
            model, info = SiglipVisionModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                weights.source, **options
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"dualtoken.weights.source {weights.source!r} cannot be read ({str(error).splitlines()[0]}). "
                "Give a local path"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"dualtoken.weights.source {weights.source!r} lacks {len(missing)} weights, which would start at random "
                f"({shorten(missing)}); name a whole SigLIP model"
            )
        core = getattr(model, "vision_model", model)
        for mine, theirs in ((self.embeddings, core.embeddings), (self.layers, core.encoder.layers)):
            mine.load_state_dict(theirs.state_dict())
        self.post_norm.load_state_dict(core.post_layernorm.state_dict())
        self.head.load_state_dict(core.head.state_dict())

    def restore_buffers(self) -> None:
        super().restore_buffers()
        table = self.embeddings.position_embedding.weight
        self.embeddings.position_ids = torch.arange(len(table), device=table.device)[None]

    def _run(self, x: Tensor, first: int, last: int) -> dict[int, Tensor]:
        """Outputs of blocks ``first + 1 … last``, by number; x is the output of block ``first``."""
        if len(x) == 0:  # transformers' attention cannot reshape an empty batch
            outputs = self._run(x.new_zeros(1, *x.shape[1:]), first, last)
            return {number: output[:0] for number, output in outputs.items()}
        outputs = {first: x}
        for number in range(first + 1, last + 1):
            result = self.layers[number - 1](outputs[number - 1], None)
            outputs[number] = result[0] if isinstance(result, tuple) else result
        return outputs

    def _encode(self, pixels: Tensor) -> tuple[QuantizerOutput, QuantizerOutput]:
        pixels = self.check_pixels(pixels)
        hidden = self._run(self.embeddings(pixels), 0, self.config.layer_semantic)
        feature = self.pixel_down(hidden[self.config.layer_pixel])
        if self.shortcut_down is not None and self.config.layer_shortcut is not None:
            feature = feature + self.config.shortcut_weight * self.shortcut_down(hidden[self.config.layer_shortcut])
        semantic = self.semantic_down(hidden[self.config.layer_semantic])
        return self.pixel_quantizer(feature), self.semantic_quantizer(semantic)

    def _features(self, semantic: Tensor) -> dict[str, Tensor]:
        """Semantic vectors → what the rest of the vision model makes of them."""
        tokens = self.semantic_up(semantic.to(self.dtype))
        last = len(self.layers)
        hidden = self._run(tokens, self.config.layer_semantic, last)[last]
        return {"tokens": tokens, "pooled": self.head(self.post_norm(hidden))}

    def _pixels(self, vectors: Tensor) -> Tensor:
        x = to_map(self.pixel_up(vectors.to(self.dtype)), self.grid)
        if tuple(self.config.decoder_grid) != self.grid:
            x = F.interpolate(x, size=tuple(self.config.decoder_grid), mode="bilinear", align_corners=False)
        return self.decoder(self.from_codes(x))

    def _codes(self, pixel: Tensor, semantic: Tensor) -> VisualCodes:
        return VisualCodes({"pixel": pixel, "semantic": semantic}, self.grid)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> VisualCodes:
        pixel, semantic = self._encode(pixels)
        return self._codes(pixel.codes, semantic.codes)

    def quantized(self, pixels: Tensor) -> tuple[VisualCodes, dict[str, Tensor]]:
        pixel, semantic = self._encode(pixels)
        return self._codes(pixel.codes, semantic.codes), {"pixel": pixel.quantized, "semantic": semantic.quantized}

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        self.check_codes(codes)
        return {
            "pixel": self.pixel_quantizer.embed(codes.codes["pixel"]),
            "semantic": self.semantic_quantizer.embed(codes.codes["semantic"]),
        }

    def code_vectors(self, name: str, codes: Tensor) -> Tensor:
        return (self.pixel_quantizer if name == "pixel" else self.semantic_quantizer).code_vectors(codes)

    def semantic_features(self, codes: VisualCodes) -> dict[str, Tensor]:
        """codes → ``tokens`` ``(B, N, hidden)`` and ``pooled`` ``(B, hidden)`` of the vision model, from the
        semantic codes."""
        return self._features(self.embed(codes)["semantic"])

    def decode(self, codes: VisualCodes) -> Tensor:
        return self._pixels(self.embed(codes)["pixel"])

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        pixel, semantic = self._encode(pixels)
        return TokenizerOutput(
            self._pixels(pixel.quantized),
            self._codes(pixel.codes, semantic.codes),
            sum_losses({"pixel": pixel.losses, "semantic": semantic.losses}),
            self._features(semantic.quantized),
            {**tag_usage("pixel", pixel.usage), **tag_usage("semantic", semantic.usage)},
        )

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]
