"""What does ViR see: patches read in order by retention, attention whose memory fades (arXiv 2310.19731, from the paper)?"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import Mlp, drop, drop_rates, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError

Form = Literal["parallel", "recurrent", "chunkwise"]


class VirConfig(BackboneConfig):
    """ViR; defaults are ViR-S/16 as far as the paper's summaries tell. The authors published no code: retention is checked against a
    third party's module, and the decays are RetNet's, as there."""

    width: int = Field(default=384, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=6, gt=0)
    patch_size: int = Field(default=16, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    trained_size: int = Field(default=224, gt=0)
    """Image size of the position table, which is resized."""
    form: Form = "parallel"
    """How retention is computed: the three give the same numbers. recurrent and chunkwise need memory that grows with the number of
    patches, parallel with its square."""
    chunk: int = Field(default=64, ge=1)
    """Patches of one step of form chunkwise."""
    decays: list[float] | None = None
    """What of a head's memory is left after one patch, per head. Default: 1 - 2^-5, 1 - 2^-6 …"""


def retain(q: Tensor, k: Tensor, v: Tensor, decays: Tensor, form: Form, chunk: int) -> Tensor:
    """Retention of ``(B, heads, N, d)``: place n reads place m ≤ n with ``q·k d^-0.5 decay^(n - m)``. decays: ``(heads,)``."""
    q = q * q.shape[-1] ** -0.5
    if form == "parallel":
        return _parallel(q, k, v, decays)
    size = 1 if form == "recurrent" else chunk
    state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    found = []
    for start in range(0, v.shape[2], size):
        queries, keys, values = (x[:, :, start : start + size] for x in (q, k, v))
        count = values.shape[2]
        steps = torch.arange(count, device=v.device)
        fade = decays[:, None] ** (steps + 1)  # of the state, at each place of the chunk
        found.append(_parallel(queries, keys, values, decays) + (queries * fade[..., None]) @ state)
        left = decays[:, None] ** (count - 1 - steps)  # of each place, at the end of the chunk
        state = state * (decays**count)[:, None, None] + (keys * left[..., None]).transpose(-1, -2) @ values
    return torch.cat(found, dim=2)


def _parallel(q: Tensor, k: Tensor, v: Tensor, decays: Tensor) -> Tensor:
    steps = torch.arange(v.shape[2], device=v.device)
    apart = steps[:, None] - steps
    mask = (decays[:, None, None] ** apart.clamp_min(0)) * (apart >= 0)
    return (q @ k.transpose(-1, -2) * mask) @ v


class Retention(nn.Module):
    """``(B, N, D)`` to the same shape; each place reads itself and those before it."""

    def __init__(self, config: VirConfig):
        super().__init__()
        width, heads = config.width, config.num_heads
        self.form: Form = config.form
        self.chunk, self.num_heads = config.chunk, heads
        self.decays = tuple(config.decays or (1 - 2.0 ** -(5 + i) for i in range(heads)))
        self.qkv = nn.Linear(width, 3 * width)
        self.ln = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def read(self, x: Tensor) -> Tensor:
        """All heads side by side, before the norm."""
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        decays = torch.tensor(self.decays, device=x.device)
        y = retain(q.float(), k.float(), v.float(), decays, self.form, self.chunk)  # powers of a decay are lost in bf16
        return y.to(x.dtype).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.ln(self.read(x))))


class Block(nn.Module):
    """Pre-norm block of retention and an MLP."""

    def __init__(self, config: VirConfig, rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.retention = Retention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.drop_path = drop(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.retention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Vir(nn.Module):
    """Pixels to patches in raster order and, last, a class token that reads them all."""

    recompute = False

    def __init__(self, config: VirConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.trained_size // config.patch_size
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = token_table(1, self.side**2, config.width)
        self.cls_token = token_table(1, 1, config.width)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(Block(config, rates[i]) for i in range(depth))
        self.norm = nn.LayerNorm(config.width) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """``(B, N + 1, D)`` before the first block and after each, the last one normed where there is a norm."""
        x = self.patch_embed(pixels)
        positions = resize_positions(self.pos_embed, (self.side, self.side), (x.shape[2], x.shape[3]))
        x = torch.cat([x.flatten(2).transpose(1, 2) + positions, self.cls_token.expand(len(x), -1, -1)], dim=1)
        outputs = [x]
        for block in self.blocks:
            outputs.append(run(block, outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs


class VirEncoder(BackboneEncoder):
    """Patch tokens. A patch has seen only those before it in raster order, so the first ones carry little context; the class token
    (prefix) has seen all."""

    Config: ClassVar[type[EncoderConfig]] = VirConfig
    config: VirConfig
    model: Vir

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "trained_size": 16, "mlp_ratio": 2.0}
        return {"type": "vir", **sizes, "image_size": [16, 20], "form": "chunkwise", "chunk": 6, "keep_prefix": True}

    @classmethod
    def build(cls, config: VirConfig) -> Vir:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.trained_size % config.patch_size:
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        decays = config.decays
        if decays is not None and (len(decays) != config.num_heads or not all(0 < d <= 1 for d in decays)):
            raise ConfigError(
                f"decays: expected {config.num_heads} numbers above 0 and up to 1, one a head, got {decays}"
            )
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patch_size")
        depth = max(take_layers(config.layers, config.depth))
        return Vir(config, depth, config.final_norm and depth == config.depth)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs = self.model(pixels)
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        chosen = [outputs[c] for c in take_layers(self.config.layers, self.config.depth)]
        return [LayerOutput(x[:, :-1], grid, x[:, -1:]) for x in chosen]
