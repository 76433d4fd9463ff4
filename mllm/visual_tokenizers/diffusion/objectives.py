"""What does the denoiser learn to tell: the way from noise to picture (flow matching), or the noise (epsilon)?"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mllm.visual_tokenizers.diffusion.config import DiffusionDecoderConfig
from mllm.visual_tokenizers.diffusion.library import noise_alphas

LEAST_SIGMA = 0.05
"""What a sample is told of is divided by no less (JiT, arXiv 2511.13720)."""
TIMES = 1000
"""The network's clock runs from 0 to this, as that of all networks and schedulers of `diffusers` does."""


class Objective:
    """clean, noise ``(B, C, H, W)``; times ``(B,)`` as the network is told them."""

    def draw_times(self, number: int, device: torch.device) -> Tensor:
        """Random times of training, from torch's own generator of the device."""
        raise NotImplementedError

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network sees."""
        raise NotImplementedError

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What it should tell."""
        raise NotImplementedError

    def from_sample(self, told: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The same, of a network that tells the clean picture."""
        raise NotImplementedError


class FlowMatching(Objective):
    """x_t = (1 - σ) x + σ n with σ = time / 1000; target n - x (arXiv 2210.02747, 2403.03206)."""

    def __init__(self, *, logit_normal: bool):
        self.logit_normal = logit_normal

    def draw_times(self, number: int, device: torch.device) -> Tensor:
        if self.logit_normal:
            return torch.randn(number, device=device).sigmoid() * TIMES
        return torch.rand(number, device=device) * TIMES

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = (times / TIMES).view(-1, 1, 1, 1).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def from_sample(self, told: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """n - x where the network told x."""
        sigma = (times / TIMES).clamp(min=LEAST_SIGMA).view(-1, 1, 1, 1).to(noisy.dtype)
        return (noisy - told) / sigma


class Epsilon(Objective):
    """x_t = √ᾱ x + √(1 - ᾱ) n at a whole-numbered time; target n (arXiv 2006.11239)."""

    def __init__(self, config: DiffusionDecoderConfig):
        self.config = config

    @cached_property
    def alphas(self) -> Tensor:
        return noise_alphas(self.config)

    def draw_times(self, number: int, device: torch.device) -> Tensor:
        return torch.randint(len(self.alphas), (number,), device=device)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alphas = self.alphas.to(times.device)[times].view(-1, 1, 1, 1)
        return (alphas.sqrt() * clean + (1 - alphas).sqrt() * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise


def build_objective(config: DiffusionDecoderConfig) -> Objective:
    """The objective that a decoder's config names."""
    if config.objective == "epsilon":
        return Epsilon(config)
    return FlowMatching(logit_normal=config.times == "logit_normal")
