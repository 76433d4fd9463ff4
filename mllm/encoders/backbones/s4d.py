"""What does S4D see: a face, by a masked autoencoder's ViT in which each token picks experts beside the MLP (arXiv 2409.06154)?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import IMAGENET, Mlp, SelfAttention, drop, drop_rates, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError
from mllm.types import Grid, ImageSpec

_EPS = 1e-6
_TUBELET = 2


class S4dConfig(BackboneConfig):
    """S4D's ViT-B; defaults are the authors'."""

    width: int = Field(default=768, gt=0, multiple_of=2)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    patch_size: int = Field(default=16, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    frames: int = Field(default=16, ge=2, multiple_of=2)
    """A picture is a clip of so many times itself; tokens of all times are averaged on the grid."""
    first_expert_block: int = Field(default=6, ge=0)
    """Blocks from this one on have experts beside their MLP; ``depth``: none has."""
    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    expert_width: int | None = Field(default=None, gt=0)
    """Default: a quarter of the width."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens an expert takes from a whole batch, in shares of tokens × top_k ÷ experts; later ones get nothing from it, as the
    authors' do (1.0), so that a picture's features depend on the others of its batch. Default: it takes all."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Of the loss that keeps the experts evenly used, averaged over the blocks that have experts, while the encoder learns."""
    router_noise: bool = True
    """Random choices while the encoder learns. The authors' are random in evaluation too, which is not offered."""


class Router(nn.Module):
    """Which experts each token asks, and how much it listens to each."""

    def __init__(self, width: int, num_experts: int, top_k: int, noisy: bool):
        super().__init__()
        self.top_k, self.noisy = top_k, noisy
        self.topkroute_linear = nn.Linear(width, num_experts)
        self.noise_linear = nn.Linear(width, num_experts)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(…, D)`` → gates ``(…, E)`` (a softmax over the chosen ones, 0 elsewhere), the chosen ``(…, k)``, logits ``(…, E)``.
        noise: standard normal ``(…, E)``; drawn where the module learns and is noisy."""
        logits = self.topkroute_linear(x)
        if noise is None and self.training and self.noisy:
            noise = torch.randn_like(logits)
        if noise is not None:
            logits = logits + noise * F.softplus(self.noise_linear(x))
        kept, chosen = logits.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
        return gates, chosen, logits


class AdapterExperts(nn.Module):
    """A mixture of bottleneck experts on ``(B, N, D)``, without residual."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float | None = None,
        noisy: bool = True,
    ):
        super().__init__()
        self.capacity_factor = capacity_factor
        self.balance: Tensor | None = None
        self.router = Router(width, num_experts, top_k, noisy)
        self.experts = nn.ModuleList(Mlp(width, hidden) for _ in range(num_experts))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        gates, _, logits = self.router(x, noise)
        self.balance = balance_loss(gates, logits) if self.training else None
        return self.mix(x, gates)

    def mix(self, x: Tensor, gates: Tensor) -> Tensor:
        """Experts' outputs weighted by gates ``(B, N, E)``. Every expert sees all tokens where no capacity limits it: eight narrow
        products are cheaper than gathering tokens, and a compiled block stays one graph."""
        flat = gates.flatten(0, -2)
        if self.capacity_factor is not None:
            count, experts = flat.shape
            capacity = int(count * self.router.top_k / experts * self.capacity_factor)
            routed = flat > 0
            flat = flat * (routed.cumsum(0) <= capacity)
        tokens = x.flatten(0, -2)
        parts = [flat[:, e : e + 1] * expert(tokens) for e, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0).view_as(x)


def balance_loss(gates: Tensor, logits: Tensor) -> Tensor:
    """The authors' loss of a batch ``(B, N, E)``: of every picture the share of tokens an expert is chosen by times its mean logit
    (not probability, so it may be negative), averaged, times the experts squared."""
    share, weight = (gates > 0).to(logits.dtype).mean(1), logits.mean(1)
    return (share * weight).mean() * gates.shape[-1] ** 2


class Block(nn.Module):
    """Pre-norm block; experts read what the MLP reads and are added beside it."""

    def __init__(self, config: S4dConfig, index: int, rate: float):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = SelfAttention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = drop(rate)
        self.moe: AdapterExperts | None = None
        if index >= config.first_expert_block:
            hidden = config.expert_width or max(width // 4, 1)
            self.moe = AdapterExperts(
                width,
                hidden,
                config.num_experts,
                config.top_k,
                capacity_factor=config.capacity_factor,
                noisy=config.router_noise,
            )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        normed = self.norm2(x)
        y = self.mlp(normed)
        return x + self.drop_path(y if self.moe is None else y + self.moe(normed))


class S4d(nn.Module):
    """Pictures ``(B, 3, H, W)`` or clips ``(B, 3, T, H, W)`` to tokens ``(B, T / 2 · rows · cols, D)``, time by time."""

    recompute = False

    def __init__(self, config: S4dConfig, depth: int, last_norm: bool):
        super().__init__()
        size = (_TUBELET, config.patch_size, config.patch_size)
        self.frames = config.frames
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, size, stride=size)})
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(Block(config, i, rates[i]) for i in range(depth))
        self.norm = nn.LayerNorm(config.width, eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Tokens before the first block and after each, the last ones normed where there is a norm."""
        clips = pixels if pixels.ndim == 5 else pixels[:, :, None].expand(-1, -1, self.frames, -1, -1)
        x = self.patch_embed["proj"](clips).flatten(2).transpose(1, 2)
        x = x + positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        outputs = [x]
        for block in self.blocks:
            outputs.append(run(block, outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs


def positions(count: int, width: int, device: torch.device) -> Tensor:
    """``(count, width)``: VideoMAE's table, sine in even channels and cosine in odd ones of the place along all tokens."""
    pairs = torch.arange(width // 2, device=device, dtype=torch.float64)
    angles = torch.arange(count, device=device, dtype=torch.float64)[:, None] / 10000 ** (2 * pairs / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class S4dEncoder(BackboneEncoder):
    """A face's tokens on its grid. There is no class token."""

    Config: ClassVar[type[EncoderConfig]] = S4dConfig
    config: S4dConfig
    model: S4d

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2.0, "frames": 4}
        return {
            "type": "s4d",
            **sizes,
            "first_expert_block": 1,
            "num_experts": 4,
            "router_noise": False,
            "image_size": [16, 20],
        }

    @classmethod
    def default_image(cls, config: S4dConfig) -> ImageSpec:
        return ImageSpec(height=160, width=160, **IMAGENET)

    @classmethod
    def build(cls, config: S4dConfig) -> S4d:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.top_k > config.num_experts:
            raise ConfigError(f"top_k: {config.top_k} of {config.num_experts} experts cannot be chosen")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patch_size")
        depth = max(take_layers(config.layers, config.depth))
        return S4d(config, depth, config.final_norm and depth == config.depth)

    def losses(self) -> dict[str, Tensor]:
        found = []
        for block in self.model.blocks:
            experts: Any = block.moe
            if experts is not None and experts.balance is not None:
                found.append(experts.balance)
                experts.balance = None  # of one call; its graph is gone after the backward pass
        weight = self.config.balance_weight
        return {"balance": weight * torch.stack(found).mean()} if found and weight else {}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs = self.model(pixels)
        size = self.config.patch_size
        grid: Grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        chosen = [outputs[c] for c in take_layers(self.config.layers, self.config.depth)]
        return [LayerOutput(x.unflatten(1, (-1, grid[0] * grid[1])).mean(1), grid) for x in chosen]
