"""How is a part of a picture made anew, from codes, and the rest left as it was? (FOCUS: a mask, what is kept, and tokens.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.diffusion.library import build_scheduler
from mllm.visual_tokenizers.diffusion.sampling import draw_noise, generators, sample
from mllm.visual_tokenizers.recipe import MaskSpec

if TYPE_CHECKING:
    from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder


def kept_maps(decoder: DiffusionDecoder, pixels: Tensor, mask: Tensor) -> Tensor:
    """The condition ``source`` ``(B, 1 + C, *size)``: the mask (share of hidden pixels), then the picture with mid grey where it is hidden,
    as what is denoised (Stable Diffusion's inpainting layout). pixels ``(B, 3, H, W)`` in [-1, 1]; mask ``(B, 1, H, W)``, 1 where a picture
    is made anew."""
    hidden = mask.to(pixels.dtype)
    small = hidden if hidden.shape[-2:] == decoder.size else F.interpolate(hidden, size=decoder.size, mode="area")
    return torch.cat([small, decoder.to_space(pixels * (1 - hidden))], 1)


def random_masks(spec: MaskSpec, number: int, side: int) -> Tensor:
    """Boxes ``(number, 1, side, side)``, some empty and some full, from torch's own generator on the CPU."""
    masks = torch.zeros(number, 1, side, side)
    for mask in masks:
        kind, *rest = torch.rand(5).tolist()
        if kind < spec.full:
            mask.fill_(1)
        elif kind >= spec.full + spec.empty:
            low, high = spec.boxes
            height, width = (max(1, round(side * (low + (high - low) * share))) for share in rest[:2])
            top, left = round(rest[2] * (side - height)), round(rest[3] * (side - width))
            mask[:, top : top + height, left : left + width] = 1
    return masks


@torch.no_grad()
def edit(
    decoder: DiffusionDecoder,
    pixels: Tensor,
    mask: Tensor,
    codes: VisualCodes,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    feather: int = 0,
) -> Tensor:
    """Pictures with what the mask covers made anew from codes. Pixels outside the mask (and its feather) are those of the source.

    At every step what is kept is put back at that step's noise; a decoder that was trained with the condition ``source`` also sees it.

    Args:
        decoder: of the codes' tokenizer.
        pixels: ``(B, 3, H, W)`` in [-1, 1].
        mask: ``(B, 1, H, W)`` or ``(B, H, W)``, true or 1 where a picture is made anew.
        codes: of the pictures as they should become, such as a model's.
        steps: denoising steps; default: the decoder's.
        guidance: scale of classifier-free guidance; default: the decoder's.
        seed: one for all pictures or one for each.
        feather: pixels around the mask over which old and new are mixed.

    Returns:
        ``(B, 3, H, W)`` in [-1, 1].

    Raises:
        ConfigError: for a picture or mask of another size than the decoder's.
    """
    device = decoder.device
    side = decoder.image_side
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise ConfigError(
            f"pixels: {tuple(pixels.shape)}; (B, 3, {side}, {side}) is expected, the size of the decoder's pictures"
        )
    pixels = pixels.float().to(device)
    mask = (mask[:, None] if mask.dim() == 3 else mask).to(device).float()
    if mask.shape != (len(pixels), 1, *pixels.shape[-2:]):
        raise ConfigError(
            f"mask: {tuple(mask.shape)}; (B, 1, {pixels.shape[-2]}, {pixels.shape[-1]}) with B {len(pixels)} is expected"
        )
    if bool(((mask < 0) | (mask > 1)).any()):
        raise ConfigError("mask: values are 0 (kept) to 1 (made anew)")
    steps, guidance = decoder.settings(steps, guidance)
    kept = kept_maps(decoder, pixels, mask) if "source" in decoder.config.conditions else None
    conditions = decoder.conditions_of(codes, kept)
    sources = generators(seed, len(pixels))
    noise, clean = draw_noise(sources, (decoder.channels, *decoder.size), device), decoder.to_space(pixels)
    # A latent whose pixels are partly kept is made anew: what is kept of it comes back in pixels below.
    anew = F.adaptive_max_pool2d(_spread(mask, feather), decoder.size)

    def put_back(current: Tensor, time: Tensor | None) -> Tensor:
        before = clean if time is None else decoder.objective.noisy(clean, noise, _clock(time, len(clean), device))
        return anew * current + (1 - anew) * before

    scheduler = build_scheduler(decoder.config, steps)
    if hasattr(scheduler, "init_noise_sigma") and float(scheduler.init_noise_sigma) != 1.0:
        raise ConfigError(
            f"sampler {decoder.config.sampler}: edits need one that keeps noisy pictures at the scale of training; use ddim or dpm_solver"
        )
    made = sample(decoder.denoise, scheduler, noise, conditions, guidance=guidance, sources=sources, between=put_back)
    share = _feathered(mask, feather)
    return share * decoder.to_pixels(made) + (1 - share) * pixels


def _clock(time: Tensor, number: int, device: torch.device) -> Tensor:
    return torch.as_tensor(time, device=device).expand(number)


def _spread(mask: Tensor, by: int) -> Tensor:
    """The mask, ``by`` pixels larger on every side."""
    return F.max_pool2d(mask, 2 * by + 1, stride=1, padding=by) if by else mask


def _feathered(mask: Tensor, by: int) -> Tensor:
    """1 inside the mask, falling to 0 over ``by`` pixels around it."""
    if not by:
        return mask
    rings = [_spread(mask, distance) for distance in range(1, by + 1)]
    return mask + (1 - mask) * torch.stack(rings).sum(0) / (by + 1)
