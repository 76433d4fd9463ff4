"""Where does what a branch tells enter a network of `diffusers`, and how do several add up?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError

Residuals = list[Tensor | None]
Placement = Literal["spread", "first"]

_PICTURE: dict[str, int | None] = {
    "DiTTransformer2DModel": None,
    "SD3Transformer2DModel": 1,
    "CogVideoXTransformer3DModel": 0,
}
"""Transformer of `diffusers` → where the picture's tokens stand in what its blocks give; None: nothing else is given."""


def is_unet(network: nn.Module) -> bool:
    """Whether residuals go to its skips and its middle."""
    return type(network).__name__ == "UNet2DConditionModel"


def picture_blocks(network: nn.Module) -> tuple[nn.ModuleList, int | None]:
    """A transformer's blocks, and where the picture's tokens stand in what they give. Raises `ConfigError` for another network."""
    name = type(network).__name__
    if name not in _PICTURE:
        raise ConfigError(f"branches go beside transformers ({', '.join(_PICTURE)}); {name} has no such blocks")
    return network.transformer_blocks, _PICTURE[name]  # type: ignore[return-value]


def placed(
    residuals: Sequence[Tensor],
    places: int,
    *,
    placement: Placement = "first",
    keep: Tensor | None = None,
    scale: float = 1.0,
) -> Residuals:
    """What is added at each of a transformer's blocks.

    Args:
        residuals: ``(B, N, C)`` each.
        places: blocks of the transformer.
        placement: spread: each for an equal run of blocks, the last run may be shorter. first: one for each of the first blocks.
        keep: ``(B, N)``, true for tokens that get any (`untouched_patches`); None: all.
        scale: of all residuals.

    Raises:
        ConfigError: for more residuals than blocks.
    """
    if len(residuals) > places:
        raise ConfigError(f"a branch of {len(residuals)} blocks beside a network of {places}: give it at most as many")
    run = -(-places // len(residuals)) if placement == "spread" else 1
    shown = [one * scale if keep is None else one * scale * keep[..., None].to(one.dtype) for one in residuals]
    return [shown[place // run] if place // run < len(shown) else None for place in range(places)]


def summed(branches: Sequence[Residuals]) -> Residuals:
    """The residuals of several branches, added place by place (DualDiff, arXiv 2505.01857). Raises `ConfigError` where branches have other
    places."""
    if len({len(residuals) for residuals in branches}) != 1:
        raise ConfigError(
            f"branches give {[len(r) for r in branches]} residuals; those that are added have the same places"
        )
    total: Residuals = []
    for same in zip(*branches):
        told = [one for one in same if one is not None]
        total.append(torch.stack(told).sum(0) if told else None)
    return total


@contextmanager
def injected(trunk: nn.Module, residuals: Residuals) -> Iterator[None]:
    """While it is open, the blocks of a transformer add residuals, one a block, to the picture's tokens they give."""
    blocks, place = picture_blocks(trunk)

    def adding(residual: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if place is None:
                return output + residual
            return tuple(part + residual if k == place else part for k, part in enumerate(output))

        return hook

    with ExitStack() as stack:
        for block, residual in zip(blocks, residuals, strict=True):
            if residual is not None:
                stack.callback(block.register_forward_hook(adding(residual)).remove)
        yield


def told_with(trunk: nn.Module, residuals: Residuals, run: Callable[..., Any]) -> Any:
    """What the trunk tells while the residuals are added. run: calls it, with further arguments."""
    if is_unet(trunk):
        *skips, middle = residuals
        return run(down_block_additional_residuals=tuple(skips), mid_block_additional_residual=middle)
    with injected(trunk, residuals):
        return run()


def untouched_patches(mask: Tensor, patch: int) -> Tensor:
    """``(B, …, H, W)``, above 0 where something is made anew → ``(B, N)``: true for patches that lie wholly outside."""
    frames = mask.reshape(mask.shape[0], -1, *mask.shape[-2:]).float()
    return F.max_pool2d(frames, patch).flatten(1) == 0
