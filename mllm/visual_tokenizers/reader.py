"""How does a language model read an image through a visual tokenizer? As an encoder whose features are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.types import EncoderInfo, VisionFeatures, VisualCodes
from mllm.visual_tokenizers.base import CONFIG_FILE, VisualTokenizer, build_tokenizer, stored_config, tokenizer_config
from mllm.visual_tokenizers.diffusion.carried import attach
from mllm.visual_tokenizers.features import feature_grid, join_parts
from mllm.visual_tokenizers.sequence import unpack_codes


class TokenizerEncoderConfig(EncoderConfig):
    """A visual tokenizer as an encoder (TokenFlow, DualToken, VILA-U read images so)."""

    type: str = "visual_tokenizer"
    tokenizer: dict[str, Any] = Field(default_factory=dict)
    """The tokenizer's whole config; empty: read from ``config.json`` of the folder that ``weights.source`` names."""
    features: Literal["both", "semantic", "pixel"] = "both"
    """Which channels the language model gets: those of the semantic codes, of the pixel codes, or of both side by
    side. Each codebook's vectors are summed over depth or scales."""
    resize: Literal["squash", "letterbox", "crop"] = "squash"


class TokenizerEncoder(VisionEncoder):
    """Pixels → codes → the codes' vectors. Codes ``(B, S)`` (int64, `pack_codes`) may come in place of pixels.

    The values are exactly those of the codes; in training gradients pass straight through the quantizer.
    """

    Config: ClassVar[type[EncoderConfig]] = TokenizerEncoderConfig
    config: TokenizerEncoderConfig

    def __init__(self, config: TokenizerEncoderConfig):
        super().__init__(config if config.info is not None else self.resolve(config))
        self.tokenizer = build_tokenizer(self.config.tokenizer)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        convolution = {"channels": 8, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 4}
        quantizer = {"type": "vq", "size": 4, "parts": {"pixel": 2}}
        tokenizer = {
            "type": "vq",
            "image_size": 16,
            "encoder": convolution,
            "z_channels": 8,
            "quantizer": {**quantizer, "codebook": {"learn": "gradient"}},
        }
        return {"type": "visual_tokenizer", "tokenizer": tokenizer}

    @classmethod
    def resolve(cls, config: TokenizerEncoderConfig) -> Any:
        settings = config.tokenizer or _stored_config(config)
        tokenizer_settings = tokenizer_config(settings, where="tokenizer")
        if config.layers != [-1]:
            raise ConfigError(f"layers: a visual tokenizer has one output, so layers stays [-1] (got {config.layers})")
        if config.keep_prefix:
            raise ConfigError("keep_prefix: a visual tokenizer has no class or register tokens; remove the key")
        with torch.device("meta"):
            tokenizer = build_tokenizer(tokenizer_settings)
        dims = tokenizer.feature_dims
        wanted = list(dims) if config.features == "both" else [config.features]
        if any(part not in dims for part in wanted):
            raise ConfigError(f"features: {tokenizer.name} has no {config.features} part; it has {', '.join(dims)}")
        info = EncoderInfo(
            image=tokenizer.image.model_copy(update={"resize": config.resize}),
            grid=feature_grid(tokenizer),
            width=sum(dims[part] for part in wanted),
        )
        return config.model_copy(update={"tokenizer": tokenizer_settings.model_dump(mode="json"), "info": info})

    @property
    def num_codes(self) -> int:
        """S: codes of one image."""
        return self.tokenizer.tokens_per_image

    def load_pretrained(self) -> None:
        source = self.config.weights
        if source is None:
            raise CheckpointError("visual_tokenizer: no weights to load; name the saved tokenizer's folder")
        load_tokenizer_weights(self.tokenizer, source.source)

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        return [("layers.0", ["tokenizer."])]

    def restore_buffers(self) -> None:
        self.tokenizer.restore_buffers()

    def forward(
        self, pixels: Tensor, *, scene_ids: Tensor | None = None, return_attention: bool = False
    ) -> VisionFeatures:
        """pixels ``(B, 3, H, W)``, or codes ``(B, S)`` of a whole-number type."""
        if return_attention:
            raise UnavailableError("return_attention: a visual tokenizer has no attention")
        if pixels.is_meta:  # shapes alone: codes are values, which the meta device has none of
            info = self.config.resolved_info
            shape = (len(pixels), info.grid[0] * info.grid[1], info.width)
            return VisionFeatures(tokens=pixels.new_zeros(shape, dtype=self.tokenizer.dtype), grid=info.grid)
        if not pixels.is_floating_point():
            return self.read(unpack_codes(self.tokenizer, pixels))
        learning = torch.is_grad_enabled() and (
            pixels.requires_grad or any(p.requires_grad for p in self.tokenizer.parameters())
        )
        if not learning:
            return self.read(self.tokenizer.encode(pixels))
        codes, vectors = self.tokenizer.quantized(pixels)
        exact = self.tokenizer.embed(codes)
        return self._join({k: exact[k].detach() + (v - v.detach()) for k, v in vectors.items()})

    def read(self, codes: VisualCodes) -> VisionFeatures:
        """Codes → features ``(B, N, D)``."""
        return self._join(self.tokenizer.embed(codes))

    def _join(self, vectors: dict[str, Tensor]) -> VisionFeatures:
        parts = self.tokenizer.feature_parts(vectors)
        wanted = parts if self.config.features == "both" else {self.config.features: parts[self.config.features]}
        features = join_parts(self.tokenizer, wanted)
        features.tokens = features.tokens.to(self.tokenizer.dtype)
        return features


def _stored_config(config: TokenizerEncoderConfig) -> dict[str, Any]:
    if config.weights is None:
        raise ConfigError("tokenizer: give the tokenizer's config, or weights.source, the folder of a saved tokenizer")
    file = Path(config.weights.source) / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"weights.source: {config.weights.source} holds no saved visual tokenizer (no {CONFIG_FILE}); train one with "
            "`mllm tokenizer train`, or write its config under tokenizer"
        )
    return stored_config(file.parent)


def load_tokenizer_weights(tokenizer: VisualTokenizer, folder: str | Path) -> None:
    """Read the weights of a saved tokenizer into one of the same config. Raises `CheckpointError` naming the folder."""
    saved = VisualTokenizer.from_pretrained(folder)
    try:
        tokenizer.load_state_dict(saved.state_dict())
        attach(tokenizer, folder)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds a visual tokenizer of another config: {error}") from error
