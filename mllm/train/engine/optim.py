"""Which optimizer updates the groups, and in which precision?"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import ConfigError, UnavailableError
from mllm.install import package_hint
from mllm.recipe import OptimizerSpec
from mllm.train.engine.compact_adamw import CompactAdamW
from mllm.train.engine.fused_adamw import FusedAdamW, available
from mllm.train.engine.groups import Group

ZERO_OPTIMIZERS = ("adamw", "sgd")
"""Optimizers whose update is elementwise: ZeRO flattens and cuts parameters, which Muon and 8-bit blocks do not
survive."""

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "muon": 4, "sgd": 4}
_BUCKET = 1 << 28  # elements whose fp32 gradients are alive at once in `MasterWeights`


def state_bytes(spec: OptimizerSpec) -> int:
    """Bytes of optimizer state for a learning weight, float32 copies aside."""
    return STATE_BYTES[spec.type] // (2 if spec.moments == "bfloat16" else 1)


def build_optimizer(
    model: nn.Module,
    groups: Sequence[Group],
    spec: OptimizerSpec,
    *,
    master: bool = False,
    pieces: Mapping[str, tuple[nn.Parameter, int]] | None = None,
) -> Any:
    """The optimizer over named groups; every group carries ``name``, ``base_rate`` and ``names``.

    master: keep fp32 copies of low-precision parameters and update those (for engines that do not do so themselves). pieces: name → run of
    the parameter's elements that is updated in its place, and where that starts; of those that are not there nothing is.
    Raises `UnavailableError` for ``adamw_8bit`` without bitsandbytes.
    """
    parameters = {name: (p, 0) for name, p in model.named_parameters()} if pieces is None else pieces
    split = [
        part
        for group in groups
        for part in (_split_for_muon(group, model) if spec.type == "muon" else [(group, False)])
    ]
    described = [
        {
            "params": [parameters[name][0] for name in group.names if name in parameters],
            "lr": group.lr,
            "base_rate": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
            "names": [name for name in group.names if name in parameters],
            **({} if pieces is None else {"starts": [pieces[name][1] for name in group.names if name in pieces]}),
            **({"use_muon": use_muon} if spec.type == "muon" else {}),
        }
        for group, use_muon in split
    ]
    if spec.compact:
        return CompactAdamW(described, spec)
    return MasterWeights(described, spec) if master else _construct(described, spec)


def _construct(groups: list[dict[str, Any]], spec: OptimizerSpec) -> torch.optim.Optimizer:
    if spec.type == "adamw":
        return torch.optim.AdamW(groups, betas=spec.betas, eps=spec.eps, fused=True)
    if spec.type == "sgd":
        return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=spec.betas[0])
    if spec.type == "muon":
        return Muon(groups, betas=spec.betas, eps=spec.eps)
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
    except ImportError:
        raise UnavailableError(
            f"optimizer.type adamw_8bit needs the bitsandbytes package: {package_hint('bitsandbytes')}, or use adamw"
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, betas=spec.betas, eps=spec.eps)


class MasterWeights:
    """fp32 copies of bf16 parameters, updated in fp32 and copied back: rates of 1e-5 vanish in bf16's 8 bits otherwise.

    AdamW on CUDA: one kernel for all of it (`mllm.train.engine.fused_adamw`). Elsewhere gradients are cast bucket by
    bucket, so their fp32 copies never exist all at once. Looks like the inner optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], spec: OptimizerSpec):
        self.parameters = [p for group in groups for p in group["params"]]
        self.masters = [nn.Parameter(p.detach().float(), requires_grad=True) for p in self.parameters]
        by_id = {id(p): m for p, m in zip(self.parameters, self.masters)}
        self.inner = _construct([{**g, "params": [by_id[id(p)] for p in g["params"]]} for g in groups], spec)
        pairs = list(zip(self.parameters, self.masters))
        self.fused: FusedAdamW | None = None
        if spec.type == "adamw" and spec.fused is not False and all(_suits(p) for p in self.parameters):
            self.fused = FusedAdamW(self.inner, pairs)  # type: ignore[arg-type]
        elif spec.fused:
            raise ConfigError(
                "optimizer.fused: true needs adamw and CUDA with Triton; leave it out, and the plain update is used"
            )
        self._plain = pairs if self.fused is None else self.fused.small

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0, done: Callable[[nn.Parameter], None] | None = None) -> None:
        """Update from the low-precision parameters' gradients, multiplied by ``scale``. done: told of each parameter as soon as its
        update is under way."""
        if self.fused is not None and self.masters:
            device = self.masters[0].device
            self.fused.step(torch.as_tensor(scale, dtype=torch.float32, device=device), done)
        for bucket in _buckets(self._plain):
            given = [(p, p.grad, copy, torch.empty_like(copy)) for p, copy in bucket if p.grad is not None]
            if given:  # two launches, not two a tensor: a model of many small ones waits for the CPU here
                wide = [w for *_, w in given]
                _copy(wide, [gradient for _, gradient, *_ in given])
                torch._foreach_mul_(wide, scale)  # type: ignore[attr-defined]
            for parameter, _, copy, w in given:
                parameter.grad, copy.grad = None, w
            self.inner.step()
            for _, copy in bucket:
                copy.grad = None
            _copy([p for p, _ in bucket], [m for _, m in bucket])
            for parameter, _ in bucket if done is not None else []:
                done(parameter)  # type: ignore[misc]

    def restore_parameters(self) -> None:
        """Write the fp32 copies into the model (after they were loaded)."""
        if self.fused is not None:
            self.fused.forget_counts()
        with torch.no_grad():
            _copy(self.parameters, self.masters)


def _suits(parameter: Tensor) -> bool:
    """Whether the fused update can be used for a parameter."""
    return available(parameter.device) and parameter.is_contiguous()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(sources))  # type: ignore[attr-defined]


def _buckets(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> Iterable[list[tuple[nn.Parameter, nn.Parameter]]]:
    bucket: list[tuple[nn.Parameter, nn.Parameter]] = []
    size = 0
    for pair in pairs:
        if bucket and size + pair[0].numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(pair)
        size += pair[0].numel()
    if bucket:
        yield bucket


def _split_for_muon(group: Group, model: nn.Module) -> list[tuple[Group, bool]]:
    """Weights of linear layers go to Muon; embeddings, the output head, convolutions and vectors to AdamW."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    matrices = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Linear) and (head is None or m.weight is not head.weight)
    }
    parameters = dict(model.named_parameters())
    result = []
    for use_muon in (True, False):
        names = tuple(n for n in group.names if (id(parameters[n]) in matrices) is use_muon)
        if names:
            numel = sum(parameters[n].numel() for n in names)
            result.append((Group(group.part, group.lr, group.weight_decay, names, numel), use_muon))
    return result


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The update is scaled by ``0.2 sqrt(max(rows, columns))`` (Liu et al., arXiv 2502.16982), which gives it the size of
    AdamW's, so rates and decays of an AdamW recipe carry over. Groups with ``use_muon`` hold matrices only.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "use_muon": False})
        self.betas, self.eps, self.momentum = betas, eps, momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon(parameter) if group["use_muon"] else self._adam(parameter)
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def _muon(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(self.momentum).add_(gradient)
        update = orthogonalise(gradient.add(buffer, alpha=self.momentum))
        return update * (0.2 * math.sqrt(max(parameter.shape)))

    def _adam(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - self.betas[0])
        state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        denominator = (state["exp_avg_sq"] / (1 - self.betas[1] ** step)).sqrt_().add_(self.eps)
        return state["exp_avg"] / (1 - self.betas[0] ** step) / denominator


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (singular values in about 0.7 to 1.2), by a quintic Newton-Schulz
    iteration in bf16 on CUDA and fp32 elsewhere. matrix ``(R, C)`` → the same shape."""
    work = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = work.shape[0] <= work.shape[1]
    work = work if wide else work.t()
    work = work / (work.norm() + 1e-7)
    for _ in range(steps):
        gram = work @ work.t()
        work = 3.4445 * work + (-4.7750 * gram + 2.0315 * gram @ gram) @ work
    return (work if wide else work.t()).to(matrix.dtype)


OF_BF16 = (MasterWeights, CompactAdamW)
"""Optimizers of low-precision weights, which scale gradients themselves."""
AVERAGE = "average"
"""Key of the running average beside the optimizer's own state, so that checkpoints hold it."""


@torch.no_grad()
def update_average(optimizer: Any, decay: float) -> None:
    """Move the running average of every learning weight (its fp32 copy, where there is one) after a step; it starts with
    the weights after the first one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, 1 - decay)
            else:
                state[AVERAGE] = parameter.detach().clone()


@torch.no_grad()
def take_average(optimizer: Any) -> None:
    """Put the running averages in the weights' place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if AVERAGE in optimizer.state[parameter]:
                parameter.copy_(optimizer.state[parameter][AVERAGE])
    if isinstance(optimizer, OF_BF16):
        optimizer.restore_parameters()


@torch.no_grad()
def swap_average(optimizer: Any) -> None:
    """Exchange the weights and their running averages, where those are kept; a second call undoes it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            average = optimizer.state[parameter].get(AVERAGE)
            if average is not None:
                held = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(held)
    if isinstance(optimizer, OF_BF16):
        optimizer.restore_parameters()


def check_pieces(spec: OptimizerSpec, stage_name: str, engine: str) -> None:
    """Raises `ConfigError` for an optimizer that needs whole matrices where a process has some elements of each."""
    if spec.type not in ZERO_OPTIMIZERS:
        raise ConfigError(
            f"stages.{stage_name}.optimizer.type {spec.type!r} updates whole matrices or blocks of weights, of which engine: {engine} "
            f"leaves a process a piece; use engine: none, or one of {', '.join(ZERO_OPTIMIZERS)}"
        )


def check_engine(spec: OptimizerSpec, stage_name: str, zero_stage: int) -> None:
    """Raises `ConfigError` for an optimizer that cannot work on ZeRO's flattened parameters."""
    if zero_stage and spec.type not in ZERO_OPTIMIZERS:
        raise ConfigError(
            f"stages.{stage_name}.optimizer.type {spec.type!r} does not work on ZeRO's flattened parameters; "
            f"use engine: none, or one of {', '.join(ZERO_OPTIMIZERS)}"
        )
    if zero_stage and spec.compact:
        raise ConfigError(
            f"stages.{stage_name}.optimizer: master {spec.master} and moments {spec.moments} are for engine: none, sharded or fsdp2; "
            "ZeRO cuts the float32 state into one share a process instead"
        )
    if zero_stage and spec.ema is not None:
        raise ConfigError(
            f"stages.{stage_name}.optimizer.ema: ZeRO keeps no average of its slices; use engine: none, "
            "sharded or fsdp2"
        )
