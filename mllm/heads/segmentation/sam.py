"""How do SAM's prompt encoder and decoder turn prompts and an encoder's features into masks (arXiv 2304.02643)?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder

from mllm.config import StrictModel
from mllm.encoders.weights import read_weights
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.types import EncoderInfo, Grid


class SamSizes(StrictModel):
    """Sizes of SAM's prompt encoder and two-way transformer; the defaults are the published checkpoints'."""

    type: str
    width: int = 256
    layers: int = 2
    heads: int = 8
    mlp_width: int = 2048
    downsample: int = 2
    mask_channels: int = 16
    weights: str | None = None
    """Published weights, by name: a hub id or folder of transformers' ``SamModel``, or a file of the authors' (``sam_vit_*.pth``)."""

    @property
    def features_width(self) -> int:
        """Of the features that it reads."""
        return self.width

    @property
    def advice(self) -> str:
        """What to set so that an encoder gives them."""
        return "An SAM encoder gives its neck's 256 with final_norm: true"


class SamDecoderConfig(SamSizes):
    """SAM's prompt encoder and two-way mask decoder (arXiv 2304.02643); the encoder is an SAM one with its neck."""

    type: Literal["sam"] = "sam"
    num_multimask: int = 3
    iou_layers: int = 3
    iou_width: int = 256


class SamDecoder(nn.Module):
    """transformers' `SamModel` without its image encoder, called as LISA calls SAM: a projected hidden state is the only prompt."""

    without_gradient = ("iou_prediction_head", "mlps.1.", "mlps.2.", "mlps.3.")  # of the answers that are not asked for

    def __init__(self, config: SamSizes, info: EncoderInfo):
        super().__init__()
        rows, columns = info.grid
        if rows != columns:
            raise ConfigError(
                f"a {config.type} decoder reads square feature maps; the encoder's grid is {rows} × {columns}"
            )
        if info.width != config.features_width:
            raise ConfigError(
                f"a {config.type} decoder of width {config.width} reads features of {config.features_width}; the encoder gives "
                f"{info.width}. {config.advice}"
            )
        self.config, self.grid = config, info.grid
        vision = SamVisionConfig(num_pos_feats=config.width // 2, output_channels=config.width)
        prompt = SamPromptEncoderConfig(
            hidden_size=config.width,
            image_size=info.image.height,
            patch_size=info.image.height // rows,
            mask_input_channels=config.mask_channels,
        )
        mask = SamMaskDecoderConfig(
            hidden_size=config.width,
            mlp_dim=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            attention_downsample_rate=config.downsample,
        )
        whole = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
        mask._attn_implementation = "eager"
        self.shared_image_embedding = SamPositionalEmbedding(vision)
        self.prompt_encoder = SamPromptEncoder(whole)
        self.mask_decoder: Any = self.build_decoder(config, mask)
        for fixed in (
            self.shared_image_embedding,
            self.prompt_encoder,
        ):  # as in LISA; the Fourier table is no weight at all
            _never_learn(fixed)

    def build_decoder(self, config: SamSizes, sizes: SamMaskDecoderConfig) -> nn.Module:
        """What turns prompts and maps into masks. sizes: of its two-way transformer."""
        assert isinstance(config, SamDecoderConfig)
        sizes.num_multimask_outputs = config.num_multimask
        sizes.iou_head_depth, sizes.iou_head_hidden_dim = config.iou_layers, config.iou_width
        return SamMaskDecoder(sizes)

    @property
    def size(self) -> Grid:
        return 4 * self.grid[0], 4 * self.grid[1]

    def image_positions(self) -> Tensor:
        """SAM's random-Fourier map of the grid ``(1, C, h, w)``."""
        table = self.shared_image_embedding.positional_embedding
        places = (torch.arange(self.grid[0], device=table.device, dtype=table.dtype) + 0.5) / self.grid[0]
        y, x = torch.meshgrid(places, places, indexing="ij")
        return self.shared_image_embedding(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def forward(self, prompts: Tensor, tokens: Tensor, owners: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `QueryDecoder.forward`."""
        if not len(prompts):  # transformers' decoder cannot run on no prompt
            return prompts.sum() * prompts.new_zeros(0, *self.size), prompts.new_zeros(0)
        order = torch.argsort(owners, stable=True)
        pictures, counts = owners.unique(return_counts=True)
        answers = [
            self.answer(prompts[chosen], self.as_map(tokens[picture : picture + 1]))
            for picture, chosen in zip(pictures.tolist(), order.split(counts.tolist()))
        ]
        back = torch.argsort(order)
        masks = torch.cat([masks for masks, _ in answers])[back, 0]
        scores = [scores for _, scores in answers if scores is not None]
        return masks, torch.cat(scores)[back, 0] if scores else None

    def seen(self, tokens: Tensor) -> Tensor:
        """Features ``(B, N, C)`` as prompts look at them: SAM's."""
        return tokens

    def as_map(self, tokens: Tensor) -> Tensor:
        """``(B, N, C)`` → ``(B, C, h, w)``."""
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def answer(
        self, prompts: Tensor, image: Tensor, *, multimask: bool = False, dense: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """prompts ``(N, C)``, or ``(N, P, C)`` where several stand for one mask, for one picture's map ``(1, C, h, w)`` → logits
        ``(N, 1 or 3, 4h, 4w)`` and predicted IoU. dense: SAM's dense prompt (default: that of no mask)."""
        masks, scores = self.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self.image_positions().to(image.dtype),
            sparse_prompt_embeddings=self.as_prompts(prompts),
            dense_prompt_embeddings=self.no_mask() if dense is None else dense,
            multimask_output=multimask,
        )
        return masks[0], scores[0]

    def no_mask(self) -> Tensor:
        """SAM's dense prompt where no mask is given ``(1, C, h, w)``."""
        return self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *self.grid)

    def as_prompts(self, prompts: Tensor) -> Tensor:
        """``(N, C)`` or ``(N, P, C)`` → ``(1, N, P, C)``."""
        return prompts[None] if prompts.dim() == 3 else prompts[None, :, None]

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights under the names that they have here."""
        if any("pe_layer" in name for name in tensors):
            return {present_name(name): value for name, value in tensors.items()}
        return tensors

    def load_pretrained(self) -> None:
        """Read the published weights, by name. Raises `UnavailableError` where they cannot be had, `CheckpointError` where some are
        missing."""
        assert self.config.weights is not None
        tensors = self.translated(_published(self.config.weights))
        wanted = self.state_dict()
        shared = tensors.get("shared_image_embedding.positional_embedding")
        if shared is not None:
            tensors.setdefault("prompt_encoder.shared_embedding.positional_embedding", shared)
        missing = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
        if missing:
            raise CheckpointError(
                f"{self.config.weights}: {len(missing)} weights of its mask decoder are missing or of another shape, the first "
                f"{missing[0]}"
            )
        self.load_state_dict({name: tensors[name] for name in wanted})


_PRESENT = (
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    ("norm_final_attn", "layer_norm_final_attn"),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("point_embeddings.", "point_embed."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
)


def present_name(name: str) -> str:
    """A weight of the authors' checkpoint as transformers has it."""
    for former, present in _PRESENT:
        name = name.replace(former, present)
    for number in range(1, 5):
        name = name.replace(f".norm{number}.", f".layer_norm{number}.")
    if "hypernetworks_mlps" in name or "iou_prediction_head" in name:
        for former, present in (("layers.0.", "proj_in."), ("layers.1.", "layers.0."), ("layers.2.", "proj_out.")):
            if f".{former}" in name:
                return name.replace(f".{former}", f".{present}")
    return name


def _never_learn(module: nn.Module) -> None:
    """Make every parameter of a module a buffer: saved and loaded by the same name, and no part of what learns."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def _published(source: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if Path(source).is_file():
        return read_weights(Path(source))
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
        except Exception as error:
            raise UnavailableError(f"decoder.weights: {source!r} cannot be read ({error})") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnavailableError(f"decoder.weights: {source} holds no safetensors file")
    return {name: value for file in files for name, value in load_file(str(file)).items()}
