"""What does the high-resolution encoder of Vary give: SAM-B with strided convolutions behind its neck?"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, map_to_tokens
from mllm.encoders.timm import TimmConfig, TimmEncoder, create, cut, set_checkpointing, timm_layers
from mllm.encoders.weights import load_exactly, local_path, read_weights, strip_prefix
from mllm.errors import CheckpointError, ConfigError


class VaryConfig(TimmConfig):
    """SAM's image encoder and what follows it."""

    architecture: str = "samvit_base_patch16.sa1b"
    convs: list[int] = Field(default=[512], min_length=1)
    """Output channels of the 3 × 3 convolutions with stride 2 behind the neck. MoVA uses [512] (arXiv 2404.13046), Vary
    and its successors [512, 1024] (arXiv 2312.06109)."""


class SamWithConvs(nn.Module):
    """timm's SAM and strided convolutions without bias."""

    def __init__(self, sam: nn.Module, width: int, convs: list[int]):
        super().__init__()
        self.sam = sam
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            for before, after in zip([width, *convs[:-1]], convs)
        )


class VaryEncoder(TimmEncoder):
    """1024 × 1024 pixels to a 32 × 32 grid of 512 channels with the default config."""

    Config: ClassVar[type[EncoderConfig]] = VaryConfig
    config: VaryConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "window_size": 2, "neck_chans": 16}
        return {
            "type": "vary",
            "options": {**options, "global_attn_indexes": [1]},
            "image_size": 16,
            "convs": [24],
        }

    @classmethod
    def build(cls, config: VaryConfig) -> nn.Module:
        if config.layers != [-1] or not config.final_norm:
            raise ConfigError(
                "layers: the convolutions of type vary follow the neck, so layers is [-1] and final_norm true"
            )
        sam = create(config.architecture, config.resolved_info.image, config.options)
        cut(sam, config)
        return SamWithConvs(sam, int(sam.num_features), config.convs)  # type: ignore[arg-type]

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        model: Any = self.model
        unknown = self.config.resolved_info.model_copy(update={"grid": (1, 1)})
        (output,) = timm_layers(model.sam, pixels, self.config.model_copy(update={"info": unknown}))
        feature_map = output.tokens.transpose(1, 2).unflatten(2, output.grid)
        for conv in model.convs:
            feature_map = conv(feature_map)
        return [map_to_tokens(feature_map)]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        set_checkpointing(self.model.sam, enabled)

    def load_pretrained(self) -> None:
        """From a local file only: in this module's names, or the authors' (``blocks.0.mlp.lin1``, ``neck``,
        ``net_2``)."""
        source = self.required_weights().source
        path = local_path(source)
        if path is None:
            raise CheckpointError(
                f"weights: {source!r} is no local file. The Vary encoder is published inside larger checkpoints; set "
                "weights.source to the file that holds it"
            )
        state = read_weights(path)
        if not set(self.model.state_dict()) <= set(state):
            state = strip_prefix(state, {"patch_embed.proj.weight", "neck.0.weight", "sam.patch_embed.proj.weight"})
        if "patch_embed.proj.weight" in state:
            state = {_own_name(key): value for key, value in state.items()}
        unused = {f"convs.{i}.weight" for i in range(len(self.config.convs), 2)}
        load_exactly(self.model, state, source=str(path), known=unused)


def _own_name(key: str) -> str:
    if key.startswith("net_"):  # net_2, net_3: the first and second convolution
        number, _, rest = key.removeprefix("net_").partition(".")
        return f"convs.{int(number) - 2}.{rest}"
    return "sam." + key.replace(".mlp.lin", ".mlp.fc")
