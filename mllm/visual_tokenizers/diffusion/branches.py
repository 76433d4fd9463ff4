"""How does a small copy of a denoiser's first blocks tell it of a condition, and change nothing before it is trained (VideoPainter,
arXiv 2503.05639)?

Written from a description of TencentARC/VideoPainter, whose licence allows research and education only, and checked by its numbers; its
weights are not for us to ship. A branch gives residuals ``(B, N, C)``, and `injected` adds them behind the blocks of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.config import Placement

_PICTURE: dict[str, int | None] = {
    "DiTTransformer2DModel": None,
    "SD3Transformer2DModel": 1,
    "CogVideoXTransformer3DModel": 0,
}
"""Network of `diffusers` → where the picture's tokens stand in what its blocks give; None: nothing else is given."""


class ContextBranch(nn.Module):
    """The first blocks of a network, which see more than the network does, and a linear layer behind each that starts at zero.

    network: a network of the trunk's class with as many blocks as the branch has, and its own input channels. Its last layers run for
    nothing; they get gradients of zero, as all ranks expect.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        count, width = len(_blocks(network)[0]), _width(network)
        self.project = nn.ModuleList(_silent(width) for _ in range(count))

    def forward(self, run: Callable[[nn.Module], Any]) -> list[Tensor]:
        """One residual ``(B, N, C)`` for each of its blocks. run: calls the network that it is given with whatever it takes."""
        blocks, place = _blocks(self.network)
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output if place is None else output[place])

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            told = run(self.network)
        residuals = [layer(hidden) for layer, hidden in zip(self.project, seen)]
        residuals[0] = residuals[0] + 0.0 * getattr(told, "sample", told).sum()
        return residuals

    @torch.no_grad()
    def start_from(self, trunk: nn.Module, channels: int) -> None:
        """Take the trunk's weights wherever there are the same, as copies; of the patches' convolution, its first ``channels`` input
        channels, and zeros for all that only the branch sees. (The published branch shares memory with the trunk here, and its own
        masked picture starts like the noisy one.)"""
        given = trunk.state_dict()
        for name, value in self.network.state_dict().items():
            if name in given and given[name].shape == value.shape:
                value.copy_(given[name])
            elif name.endswith("proj.weight") and value.dim() == 4:
                value.zero_()
                value[:, :channels].copy_(given[name][:, :channels])


def summed(branches: Sequence[list[Tensor]]) -> list[Tensor]:
    """The residuals of several branches, added one by one (DualDiff, arXiv 2505.01857). Raises `ConfigError` for other numbers of them."""
    if len({len(residuals) for residuals in branches}) != 1:
        raise ConfigError(
            f"branches give {[len(r) for r in branches]} residuals; those that are added have the same number"
        )
    return [torch.stack(same).sum(0) for same in zip(*branches)]


@contextmanager
def injected(
    trunk: nn.Module,
    residuals: Sequence[Tensor],
    *,
    placement: Placement = "spread",
    keep: Tensor | None = None,
    scale: float = 1.0,
) -> Iterator[None]:
    """While it is open, the trunk's blocks add residuals to the picture's tokens they give.

    Args:
        trunk: a network of `diffusers` with transformer blocks.
        residuals: ``(B, N, C)`` each.
        placement: spread: each for an equal run of blocks, the last run may be shorter. first: one for each of the first blocks.
        keep: ``(B, N)``, true for tokens that get any (`untouched_patches`); None: all.
        scale: of all residuals.
    """
    blocks, place = _blocks(trunk)
    if len(residuals) > len(blocks):
        raise ConfigError(
            f"a branch of {len(residuals)} blocks beside a network of {len(blocks)}: give it at most as many"
        )
    run = -(-len(blocks) // len(residuals)) if placement == "spread" else 1
    shown = [one * scale if keep is None else one * scale * keep[..., None].to(one.dtype) for one in residuals]

    def adding(residual: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if place is None:
                return output + residual
            return tuple(part + residual if k == place else part for k, part in enumerate(output))

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            if index // run < len(shown):
                stack.callback(block.register_forward_hook(adding(shown[index // run])).remove)
        yield


def untouched_patches(mask: Tensor, patch: int) -> Tensor:
    """``(B, …, H, W)``, above 0 where something is made anew → ``(B, N)``: true for patches that lie wholly outside."""
    frames = mask.reshape(mask.shape[0], -1, *mask.shape[-2:]).float()
    return F.max_pool2d(frames, patch).flatten(1) == 0


def _width(network: Any) -> int:
    """Channels of the tokens between its blocks."""
    return int(network.config.num_attention_heads * network.config.attention_head_dim)


def _silent(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _blocks(network: nn.Module) -> tuple[nn.ModuleList, int | None]:
    name = type(network).__name__
    if name not in _PICTURE:
        raise ConfigError(f"branches go beside transformers ({', '.join(_PICTURE)}); {name} has no such blocks")
    return network.transformer_blocks, _PICTURE[name]  # type: ignore[return-value]
