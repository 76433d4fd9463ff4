"""How is AdamW's update of low-precision weights done in one pass over memory?

A Triton kernel reads the gradient, scales and clips it, updates the fp32 copy and the two moments, and writes the
low-precision weight: 28 bytes a parameter where separate casts, scalings and updates move 44. State and arithmetic are
those of `torch.optim.AdamW` with fp32 weights; `reference_update` says them in plain torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16
"""Elements below which a tensor is left to torch's own update, which takes many tensors in one launch."""
BLOCK, WARPS = 4096, 8
"""Elements of one program of a kernel, and its warps."""


def available(device: torch.device) -> bool:
    """Whether the kernel can run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def reference_update(
    parameter: Tensor,
    gradient: Tensor,
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    scale: Tensor | float,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One update in place, in torch operations. parameter, gradient: low precision; master, mean, square: fp32, of the
    same shape. scale: what gradients are multiplied by (clipping); step: this update's number, from 1 on."""
    wide = gradient.float() * scale
    master.sub_(master * (rate * weight_decay))
    mean.mul_(betas[0]).add_(wide, alpha=1 - betas[0])
    square.mul_(betas[1]).addcmul_(wide, wide, value=1 - betas[1])
    denominator = square.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    master.addcdiv_(mean, denominator, value=-rate / (1 - betas[0] ** step))
    parameter.copy_(master)


def fused_update(
    parameter: Tensor,
    gradient: Tensor,
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    scale: Tensor,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """`reference_update` in one kernel. All tensors are contiguous and on one GPU; scale is a tensor of one element
    there."""
    size = master.numel()
    _kernel()[((size + BLOCK - 1) // BLOCK,)](
        parameter,
        gradient,
        master,
        mean,
        square,
        scale,
        size,
        *coefficients(rate, betas, eps, weight_decay, step),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def coefficients(
    rate: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
) -> tuple[float, ...]:
    """The numbers that the kernels take behind ``size``, in their order. step: this update's number, from 1 on."""
    decay, step_size = rate * weight_decay, rate / (1 - betas[0] ** step)
    root_correction = 1 / math.sqrt(1 - betas[1] ** step)
    numbers = decay, step_size, root_correction, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps
    return tuple(map(float, numbers))


@functools.cache
def _kernel() -> Any:
    """The compiled kernel. Made at the first use: Triton is there on CUDA only."""
    return importlib.import_module("mllm.train.engine.fused_adamw_kernel").update_kernel


class FusedAdamW:
    """Updates the large tensors of a `torch.optim.AdamW` over fp32 copies; keeps its state as torch does.

    pairs: (low-precision parameter, its fp32 copy). The smaller ones are left to the optimizer itself.
    """

    def __init__(self, optimizer: torch.optim.AdamW, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]):
        self.optimizer = optimizer
        self.large = {id(copy): parameter for parameter, copy in pairs if copy.numel() >= SMALLEST}
        self.small = [(parameter, copy) for parameter, copy in pairs if copy.numel() < SMALLEST]
        self._counts: dict[int, int] = {}

    def forget_counts(self) -> None:
        """Read the numbers of updates done from the state again (after it was loaded)."""
        self._counts.clear()

    @torch.no_grad()
    def step(self, scale: Tensor, done: Callable[[nn.Parameter], None] | None = None) -> None:
        """Update every large parameter that has a gradient, multiplied by ``scale``; the gradients are freed. done: told of each as soon
        as its update is under way."""
        counters = []
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                parameter = self.large.get(id(master))
                if parameter is None or parameter.grad is None:
                    continue
                state = self._state_of(master)
                self._counts[id(master)] += 1
                counters.append(state["step"])
                fused_update(
                    parameter.detach(),
                    parameter.grad.contiguous(),
                    master.detach(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    scale=scale,
                    rate=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=self._counts[id(master)],
                )
                parameter.grad = None
                if done is not None:
                    done(parameter)
        if counters:
            torch._foreach_add_(counters, 1)  # type: ignore[attr-defined]

    def _state_of(self, master: Tensor) -> dict[str, Any]:
        state = self.optimizer.state[master]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            self._counts[id(master)] = 0
        elif id(master) not in self._counts:
            self._counts[id(master)] = int(state["step"])
        return state
