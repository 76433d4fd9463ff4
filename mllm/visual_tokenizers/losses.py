"""What is a tokenizer's training loss made of?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.visual_tokenizers.base import TokenizerOutput, VisualTokenizer
from mllm.visual_tokenizers.networks.discriminator import adaptive_weight, generator_loss
from mllm.visual_tokenizers.outliers import gradient_masked, grid_regions, region_mask, soft_target
from mllm.visual_tokenizers.perceptual import PerceptualLoss
from mllm.visual_tokenizers.recipe import LossesSpec, OutliersSpec
from mllm.visual_tokenizers.teacher import semantic_loss


class TokenizerLosses(nn.Module):
    """Reconstruction, perceptual, adversarial, semantic and the tokenizer's own losses, weighted and named.

    The teacher and the perceptual network live here, not in the tokenizer, and are not saved with it. The discriminator
    learns by itself (an optimizer of its own) and is no part of this module.
    """

    def __init__(
        self,
        spec: LossesSpec,
        tokenizer: VisualTokenizer,
        teacher: nn.Module | None,
        discriminator: nn.Module | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.perceptual = None if self.spec.perceptual is None else PerceptualLoss(self.spec.perceptual)
        self.teacher = teacher
        self.tokenizer_grid = tokenizer.grids.get("semantic", tokenizer.grid)
        # In a tuple, so that they are not registered (and saved, and moved) as parts of the losses.
        self._beside = (tokenizer, discriminator)

    def adversarial_is_on(self, step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return self.spec.adversarial is not None and step >= self.spec.adversarial.start

    def forward(self, output: TokenizerOutput, pixels: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Named weighted losses of a batch ``(B, 3, H, W)`` in [-1, 1], and their sum."""
        named: dict[str, Tensor] = {}
        made, taught = output.reconstruction.float(), None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(pixels)
        if self.spec.outliers is not None and taught is not None and step >= self.spec.outliers.start:
            keep = self._kept(self.spec.outliers, made, pixels, taught)
            output.usage["kept_pixels"] = keep.float().mean()
            made = gradient_masked(made, keep)
        if self.spec.l1:
            named["l1"] = self.spec.l1 * F.l1_loss(made, pixels)
        if self.spec.l2:
            named["l2"] = self.spec.l2 * F.mse_loss(made, pixels)
        if self.perceptual is not None:
            assert self.spec.perceptual is not None
            named["perceptual"] = self.spec.perceptual.weight * self.perceptual(made, pixels)
        seen = sum(named.values(), made.new_zeros(()))
        unknown = set(self.spec.weights) - set(output.losses)
        if unknown:
            raise ConfigError(f"losses.weights: no loss {sorted(unknown)}; this tokenizer has {sorted(output.losses)}")
        for key, value in output.losses.items():
            named[key] = self.spec.weights.get(key, self.spec.quantizer) * value
        if self.teacher is not None:
            assert self.spec.semantic is not None
            grids = (self.tokenizer_grid, self.teacher.grid)
            named.update(semantic_loss(self.spec.semantic, output.features, taught, grids))  # type: ignore[arg-type]
        total = sum(named.values(), made.new_zeros(()))
        if self.adversarial_is_on(step):
            named["adversarial"] = self._adversarial(made, seen)
            total = total + named["adversarial"]
        return named, total

    @torch.no_grad()
    def _kept(self, spec: OutliersSpec, made: Tensor, pixels: Tensor, taught: dict[str, Tensor]) -> Tensor:
        """``(B, 1, H, W)``: how far each pixel is learned from."""
        assert self.teacher is not None
        size = pixels.shape[-2:]
        unlike = 1 - F.cosine_similarity(self.teacher(made)["tokens"].float(), taught["tokens"].float(), dim=-1)
        grid: Any = self.teacher.grid
        features = F.interpolate(unlike.view(-1, 1, *grid), size=size, mode="nearest")
        if spec.kind == "soft":
            return soft_target(features)
        regions = grid_regions(size[0], size[1], spec.region, pixels.device)
        residual = (made - pixels).abs().mean(1, keepdim=True)
        return region_mask(residual, features, regions, quantile=spec.quantile)

    def _adversarial(self, made: Tensor, seen: Tensor) -> Tensor:
        spec = self.spec.adversarial
        tokenizer, discriminator = self._beside
        assert spec is not None and discriminator is not None
        discriminator.requires_grad_(False)
        loss = generator_loss(discriminator(made))
        discriminator.requires_grad_(True)
        weight: Tensor | float = spec.weight
        if spec.adaptive is not None:
            last = tokenizer.last_layer()
            if last.requires_grad:
                low, high = spec.adaptive
                weight = spec.weight * adaptive_weight(seen, loss, last, low=low, high=high)
        return weight * loss
