"""Which networks judge whether a patch is real, and what are their losses?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.visual_tokenizers.networks.settings import DiscriminatorConfig


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): ``(B, 3, H, W)`` → one logit per patch ``(B, 1, h, w)``."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.channels
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(wider)]
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class _DiscriminatorBlock(nn.Module):
    """norm, leaky ReLU, 3×3 convolution; the shortcut is resized (bilinear) and mixed by 1×1."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.norm = nn.GroupNorm(min(32, inside), inside, eps=1e-6)
        self.conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.leaky_relu(self.norm(x), 0.2))
        if h.shape[-2:] != x.shape[-2:]:
            x = F.interpolate(x, size=h.shape[-2:], mode="bilinear")
        return h + (x if self.shortcut is None else self.shortcut(x))


class ResidualDiscriminator(nn.Module):
    """DualToken's discriminator: ``(B, 3, H, W)`` → patch logits."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.channels
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, 8)
            layers.append(_DiscriminatorBlock(width, wider, 2 if index < config.num_layers else 1))
            width = wider
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def build_discriminator(config: DiscriminatorConfig) -> nn.Module:
    return PatchDiscriminator(config) if config.type == "patch" else ResidualDiscriminator(config)


def hinge_discriminator_loss(real: Tensor, fake: Tensor, *, leak: float = 0.0) -> Tensor:
    """Half of ``mean max(0, 1 - real) + mean max(0, 1 + fake)``; leak: slope below zero (0: the hinge;
    DualToken's code has 0.01)."""
    return 0.5 * (F.leaky_relu(1 - real, leak).mean() + F.leaky_relu(1 + fake, leak).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)``."""
    return -fake.mean()


def gate(weight: float, step: int, start: int) -> float:
    """``weight`` from step ``start`` on, 0 before."""
    return weight if step >= start else 0.0


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, low: float = 0.0, high: float = 1e4
) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last layer, clamped (VQGAN; DualToken clamps to
    [0.3, 10])."""
    first = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    second = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (first.norm() / (second.norm() + 1e-4)).clamp(low, high).detach()
