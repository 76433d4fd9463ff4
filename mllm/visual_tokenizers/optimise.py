"""What does a training step need beside the losses: parameters that learn, optimizer, rate, order of images, ranks?"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.recipe import OptimizerSpec, ScheduleSpec
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.recipe import TokenizerRecipe


def choose_parameters(tokenizer: VisualTokenizer, recipe: TokenizerRecipe) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; all others stop requiring a gradient. Raises `ConfigError` for a prefix that
    matches nothing."""
    names = [name for name, parameter in tokenizer.named_parameters() if parameter.requires_grad]
    for key, prefixes in (("only", recipe.only), ("freeze", recipe.freeze)):
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                parts = sorted({name.split(".")[0] for name in names})
                raise ConfigError(f"{key}: no trainable parameter starts with {prefix!r}. Parts: {', '.join(parts)}")
    chosen = {}
    for name, parameter in tokenizer.named_parameters():
        learns = parameter.requires_grad and (not recipe.only or name.startswith(tuple(recipe.only)))
        learns = learns and not (recipe.freeze and name.startswith(tuple(recipe.freeze)))
        parameter.requires_grad_(learns)
        if learns:
            chosen[name] = parameter
    return chosen


def build_optimizer(spec: OptimizerSpec, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW (Adam at weight decay 0; none on vectors and scalars) or SGD."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.type == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=spec.betas[0])
    return torch.optim.AdamW(groups, lr=rate, betas=spec.betas, eps=spec.eps)


def rate_factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then the schedule's shape down to its minimum."""
    warmup = min(math.ceil(spec.warmup * steps) if spec.warmup < 1 else int(spec.warmup), steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[spec.type]
    return spec.minimum + (1 - spec.minimum) * shape


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step of every rank."""
    return (seed * 1_000_003 + step) * 8192 + 2 * rank


_orders: dict[tuple[int, int, int], Tensor] = {}


def epoch_order(size: int, seed: int, position: int) -> int:
    """Image number ``position`` of an endless sequence of shuffled epochs."""
    epoch, place = divmod(position, size)
    key = (size, seed, epoch)
    if key not in _orders:
        if len(_orders) > 4:
            _orders.clear()
        _orders[key] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return int(_orders[key][place])


def broadcast_state(module: nn.Module) -> None:
    """Rank 0's parameters and buffers to every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean of the gradients over ranks, in one message. A parameter without a gradient on any rank keeps none."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    have = [p for p in parameters if p.grad is not None]
    if not have:
        return
    flat = torch.cat([p.grad.flatten() for p in have])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(have, flat.split([p.numel() for p in have])):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter))


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """Moving average of the parameters; buffers (moving-average codebooks, counts) are copied."""
    parameters = {name for name, _ in module.named_parameters()}
    state = module.state_dict()
    moving = [key for key, value in state.items() if key in parameters and value.dtype.is_floating_point]
    if moving:  # one call for all of them: on CUDA a launch each would take longer than the sums
        own, new = [average[key] for key in moving], [state[key].detach() for key in moving]
        torch._foreach_lerp_(own, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for key in state.keys() - set(moving):
        average[key].copy_(state[key])
