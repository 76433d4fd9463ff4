"""How do an encoder's features and a projected hidden state become a mask?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder

from mllm.config import StrictModel
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.types import EncoderInfo, Grid


class QueryDecoderConfig(StrictModel):
    """A light decoder for small models: the features are raised to four times their grid, once a picture, and every mask is a query's
    product with them, after it has looked at them (Mask2Former's idea, arXiv 2112.01527)."""

    type: Literal["query"] = "query"
    width: int = Field(default=128, ge=8)
    depth: int = Field(default=2, ge=0)
    heads: int = Field(default=4, ge=1)


class SamDecoderConfig(StrictModel):
    """SAM's prompt encoder and two-way mask decoder (arXiv 2304.02643); the encoder is an SAM one with its neck. Sizes of the published
    checkpoints are the defaults."""

    type: Literal["sam"] = "sam"
    width: int = 256
    layers: int = 2
    heads: int = 8
    mlp_width: int = 2048
    downsample: int = 2
    num_multimask: int = 3
    iou_layers: int = 3
    iou_width: int = 256
    mask_channels: int = 16
    weights: str | None = None
    """Published weights, by name: a hub id or folder of transformers' ``SamModel``, or a file of the authors' (``sam_vit_*.pth``)."""


DecoderConfig = Annotated[QueryDecoderConfig | SamDecoderConfig, Field(discriminator="type")]


class QueryDecoder(nn.Module):
    """Prompts ``(N, C)`` and the features of their pictures → logits at four times the grid."""

    without_gradient: tuple[str, ...] = ()

    def __init__(self, config: QueryDecoderConfig, info: EncoderInfo):
        super().__init__()
        if config.width % config.heads or config.width % 4:
            raise ConfigError(
                f"decoder.width is {config.width}: it must be divisible by heads ({config.heads}) and by 4"
            )
        self.config, self.grid, width = config, info.grid, config.width
        self.inner = nn.Linear(info.width, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Look(width, config.heads) for _ in range(config.depth))
        self.raise1 = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.norm1 = nn.GroupNorm(1, width // 2)
        self.raise2 = nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)
        self.smooth = nn.Conv2d(width // 4, width // 4, 3, padding=1)
        self.out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width // 4 + 1))

    @property
    def size(self) -> Grid:
        return 4 * self.grid[0], 4 * self.grid[1]

    def forward(self, prompts: Tensor, tokens: Tensor, owners: Tensor) -> tuple[Tensor, Tensor | None]:
        """prompts ``(N, C)``; tokens ``(B, N', D)`` of B pictures; owners ``(N,)``: the picture of each → logits ``(N, 4h, 4w)``, and
        what the decoder takes its IoU for ``(N,)`` (None: it does not say)."""
        rows, columns = self.grid
        pixels = self.norm(self.inner(tokens) + _positions(self.grid, self.config.width).to(tokens))
        queries = prompts[:, None]
        for layer in self.layers:
            queries = layer(queries, pixels[owners])
        maps = pixels.transpose(1, 2).unflatten(2, (rows, columns))
        maps = nn.functional.gelu(self.norm1(self.raise1(maps)))
        maps = nn.functional.gelu(self.raise2(maps))
        maps = maps + self.smooth(maps)
        weights, bias = self.out(queries[:, 0]).split([maps.shape[1], 1], -1)
        return torch.einsum("nc,nchw->nhw", weights, maps[owners]) + bias[..., None], None


class _Look(nn.Module):
    """A query looks at its picture, then thinks."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm(queries), pixels, pixels, need_weights=False)[0]
        return queries + self.mlp(queries)


def _positions(grid: Grid, width: int) -> Tensor:
    """Sine and cosine of rows and columns ``(rows * columns, width)``."""
    parts = []
    for axis, number in enumerate(grid):
        places = torch.arange(number).float()[:, None] * torch.exp(
            -math.log(100.0) * torch.arange(width // 4).float() / (width // 4)
        )
        waves = torch.cat([places.sin(), places.cos()], 1)
        parts.append(waves[:, None].expand(-1, grid[1], -1) if axis == 0 else waves[None].expand(grid[0], -1, -1))
    return torch.cat(parts, -1).flatten(0, 1)


class SamDecoder(nn.Module):
    """transformers' `SamModel` without its image encoder, called as LISA calls SAM: a projected hidden state is the only prompt."""

    without_gradient = ("iou_prediction_head", "mlps.1.", "mlps.2.", "mlps.3.")  # of the answers that are not asked for

    def __init__(self, config: SamDecoderConfig, info: EncoderInfo):
        super().__init__()
        rows, columns = info.grid
        if rows != columns:
            raise ConfigError(f"a sam decoder reads square feature maps; the encoder's grid is {rows} × {columns}")
        if info.width != config.width:
            raise ConfigError(
                f"a sam decoder of width {config.width} reads features of that width; the encoder gives {info.width}. An SAM encoder "
                "gives its neck's 256 with final_norm: true"
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
            num_multimask_outputs=config.num_multimask,
            iou_head_depth=config.iou_layers,
            iou_head_hidden_dim=config.iou_width,
        )
        whole = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
        mask._attn_implementation = "eager"
        self.shared_image_embedding = SamPositionalEmbedding(vision)
        self.prompt_encoder = SamPromptEncoder(whole)
        self.mask_decoder = SamMaskDecoder(mask)
        for fixed in (
            self.shared_image_embedding,
            self.prompt_encoder,
        ):  # as in LISA; the Fourier table is no weight at all
            _never_learn(fixed)

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
        return torch.cat([masks for masks, _ in answers])[back, 0], torch.cat([scores for _, scores in answers])[
            back, 0
        ]

    def as_map(self, tokens: Tensor) -> Tensor:
        """``(B, N, C)`` → ``(B, C, h, w)``."""
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def answer(self, prompts: Tensor, image: Tensor, *, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """prompts ``(N, C)`` for one picture's map ``(1, C, h, w)`` → logits ``(N, 1 or 3, 4h, 4w)`` and predicted IoU."""
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *self.grid)
        masks, scores = self.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self.image_positions().to(image.dtype),
            sparse_prompt_embeddings=prompts[None, :, None],
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return masks[0], scores[0]

    def load_pretrained(self) -> None:
        """Read the published weights, by name. Raises `UnavailableError` where they cannot be had, `CheckpointError` where some are
        missing."""
        assert self.config.weights is not None
        tensors = _published(self.config.weights)
        if any("pe_layer" in name for name in tensors):
            tensors = {present_name(name): value for name, value in tensors.items()}
        wanted = self.state_dict()
        shared = tensors.get("shared_image_embedding.positional_embedding")
        if shared is not None:
            tensors.setdefault("prompt_encoder.shared_embedding.positional_embedding", shared)
        missing = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
        if missing:
            raise CheckpointError(
                f"{self.config.weights}: {len(missing)} weights of SAM's mask decoder are missing or of another shape, the first "
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
        if source.endswith(".safetensors"):
            return load_file(source)
        return torch.load(source, map_location="cpu", weights_only=True)
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


DECODERS: dict[str, Any] = {"query": QueryDecoder, "sam": SamDecoder}
