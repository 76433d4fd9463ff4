"""How is AdamW's state of bf16 weights kept in fewer bytes, and what does that change?

``master: low_bits`` keeps beside each bf16 weight the 16 bits that its float32 copy has more: together they are that copy bit for bit,
so the update is float32's. The bf16 weight is the nearest to it, as it is of a copy; where two are equally near (of random bits one in
131,072) it is the one away from zero, not the even one.

``moments: bfloat16`` keeps AdamW's two moments in bf16. They are updated in float32 and rounded up or down at random, so that on
average nothing is lost: an increment of a thousandth would vanish if it were rounded to the nearest. The chance comes from the
weight's name, its place and the update's number, not from a generator: any run of the same recipe, resumed or not, rounds the same way,
and so does a process that updates some of a tensor's elements.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mllm.errors import ConfigError
from mllm.recipe import OptimizerSpec
from mllm.train.engine.fused_adamw import BLOCK, WARPS, available, coefficients

_SLICE = 1 << 24
"""Elements that are rounded at once."""
_WORD = 0xFFFFFFFF


def join_bits(parameter: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that bf16 weights and their low bits are together. low: int16, of the same shape."""
    return (parameter.detach().view(torch.int16).int().bitwise_left_shift_(16) + low.int()).view(torch.float32)


def split_bits(weights: Tensor, parameter: Tensor, low: Tensor) -> None:
    """Write float32 weights into bf16 weights and low bits, which `join_bits` turns into the same again."""
    bits = weights.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    low.copy_(bits - high.bitwise_left_shift(16))
    parameter.detach().view(torch.int16).copy_(high)


def key_of(name: str) -> int:
    """What distinguishes the roundings of one weight tensor from those of another."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") & 0x7FFFFFFF


def turn_of(step: int) -> int:
    """What distinguishes the roundings of one update from those of another."""
    return (step * 0x9E3779B1) & 0x7FFFFFFF


def round_moments(
    mean: Tensor, square: Tensor, to_mean: Tensor, to_square: Tensor, *, key: int, step: int, first: int = 0
) -> None:
    """Write float32 moments into bf16 ones, each up or down with the chances that keep its mean. first: place in its weight tensor of
    what may be a run of one."""
    turn = turn_of(step)
    wide, narrow = (mean.reshape(-1), square.reshape(-1)), (to_mean.reshape(-1), to_square.reshape(-1))
    for start in range(0, wide[0].numel(), _SLICE):
        part = slice(start, min(start + _SLICE, wide[0].numel()))
        places = torch.arange(first + part.start, first + part.stop, device=mean.device)
        chance = _mixed(_mixed(places ^ key) ^ turn)
        for source, target, bits in zip(wide, narrow, (chance & 0xFFFF, chance >> 16)):
            rounded = (source[part].contiguous().view(torch.int32) + bits.int()).bitwise_right_shift_(16)
            target[part].view(torch.int16).copy_(rounded)
    for target, flat in zip((to_mean, to_square), narrow):
        if not target.is_contiguous():  # with channels last a place is counted as without
            target.copy_(flat.view_as(target))


def _mixed(number: Tensor) -> Tensor:
    """The 32 bits of each number (int64), mixed so that all depend on all (MurmurHash3's finaliser)."""
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _WORD
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _WORD
    return number ^ (number >> 16)


class CompactAdamW:
    """AdamW over bf16 weights with ``master: low_bits``, ``moments: bfloat16`` or both.

    A tensor is updated by one Triton kernel where there is CUDA, elsewhere by torch's own update of its float32 values. Looks like a torch
    optimizer; ``param_groups`` hold what is updated: the float32 copies, or with low bits the model's own weights.
    """

    def __init__(self, groups: list[dict[str, Any]], spec: OptimizerSpec):
        self.spec = spec
        self.parameters = [p for group in groups for p in group["params"]]
        wrong = next((p.dtype for p in self.parameters if p.dtype != torch.bfloat16), None)
        if wrong is not None:
            raise ConfigError(
                f"optimizer.master {spec.master} with moments {spec.moments} is for bf16 weights; these are {wrong}: set dtype: bfloat16"
            )
        self.low: dict[int, Tensor] = {}
        names = {id(p): name for group in groups for p, name in zip(group["params"], group["names"])}
        self.masters: list[nn.Parameter] = []
        if spec.master == "low_bits":
            self.low = {id(p): torch.zeros_like(p, dtype=torch.int16, requires_grad=False) for p in self.parameters}
            copies = self.parameters
        else:
            self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
            copies = self.masters
        self._copy = dict(zip(map(id, self.parameters), copies))
        self._low_precision = dict(zip(map(id, copies), self.parameters))
        self._keys = {id(self._copy[id(p)]): key_of(names[id(p)]) for p in self.parameters}
        starts = {
            id(p): start for g in groups for p, start in zip(g["params"], g.get("starts", [0] * len(g["params"])))
        }
        self._first = {id(self._copy[id(p)]): starts[id(p)] for p in self.parameters}
        defaults = {"betas": spec.betas, "eps": spec.eps}
        self.param_groups = [{**defaults, **g, "params": [self._copy[id(p)] for p in g["params"]]} for g in groups]
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)
        self._counts: dict[int, int] = {}
        suits = all(available(p.device) and p.is_contiguous() for p in self.parameters)
        if spec.fused and not suits:
            raise ConfigError(
                "optimizer.fused: true needs adamw and CUDA with Triton; leave it out, and the plain update is used"
            )
        self.fused = suits and spec.fused is not False

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0, done: Callable[[nn.Parameter], None] | None = None) -> None:
        """Update from the low-precision weights' gradients, multiplied by ``scale``; they are freed. done: told of each of the weights as
        soon as its update is under way."""
        counters = []
        for group in self.param_groups:
            for copy in group["params"]:
                parameter = self._low_precision[id(copy)]
                if parameter.grad is None:
                    continue
                state = self.state_of(copy)
                if id(copy) not in self._counts:
                    self._counts[id(copy)] = int(state["step"])
                self._counts[id(copy)] += 1
                if self.fused:
                    self._kernel_step(group, copy, parameter.grad, state, scale)
                    counters.append(state["step"])
                else:
                    self._plain_step(group, copy, parameter.grad, state, scale)
                parameter.grad = None
                if done is not None:
                    done(parameter)
        if counters:
            torch._foreach_add_(counters, 1)  # type: ignore[attr-defined]

    def state_of(self, copy: Tensor) -> dict[str, Any]:
        """The state of something in ``param_groups``, made where there is none yet."""
        state = self.state[copy]
        dtype = torch.bfloat16 if self.spec.moments == "bfloat16" else torch.float32
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=copy.device))
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(copy, dtype=dtype, requires_grad=False)
        return state

    def weights(self, copy: Tensor) -> Tensor:
        """The float32 weights of something in ``param_groups``; with low bits a new tensor (`put` writes it back)."""
        return copy.detach() if not self.low else join_bits(copy, self.low[id(copy)])

    @torch.no_grad()
    def put(self, copy: Tensor, weights: Tensor) -> None:
        """Make these float32 weights those of something in ``param_groups``, and of the model."""
        parameter = self._low_precision[id(copy)]
        if self.low:
            split_bits(weights.view_as(copy), parameter, self.low[id(copy)])
            return
        copy.detach().copy_(weights.view_as(copy))
        parameter.detach().copy_(copy)

    def restore_parameters(self) -> None:
        """Write the float32 copies into the model, and read the numbers of updates again (after they were loaded)."""
        self._counts.clear()
        if not self.low:
            with torch.no_grad():
                torch._foreach_copy_(list(self.parameters), list(self.masters))  # type: ignore[attr-defined]

    def _kernel_step(
        self, group: dict[str, Any], copy: Tensor, gradient: Tensor, state: dict[str, Any], scale: Tensor | float
    ) -> None:
        narrow = self.spec.moments == "bfloat16"
        mean, square = (state[k].view(torch.int16) if narrow else state[k] for k in ("exp_avg", "exp_avg_sq"))
        step, size = self._counts[id(copy)], copy.numel()
        kernel = importlib.import_module("mllm.train.engine.fused_adamw_kernel").compact_kernel
        kernel[((size + BLOCK - 1) // BLOCK,)](
            self._low_precision[id(copy)].detach().view(torch.int16),
            gradient.contiguous(),
            self.low[id(copy)] if self.low else copy.detach(),
            mean,
            square,
            torch.as_tensor(scale, dtype=torch.float32, device=copy.device),
            size,
            *coefficients(group["lr"], group["betas"], group["eps"], group["weight_decay"], step),
            self._keys[id(copy)],
            turn_of(step),
            self._first[id(copy)],
            LOW_BITS=bool(self.low),
            NARROW=narrow,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )

    def _plain_step(
        self, group: dict[str, Any], copy: Tensor, gradient: Tensor, state: dict[str, Any], scale: Tensor | float
    ) -> None:
        narrow = self.spec.moments == "bfloat16"
        wide = [state[key].float() if narrow else state[key] for key in ("exp_avg", "exp_avg_sq")]
        weights = self.weights(copy)
        adamw(
            [weights],
            [gradient.float().mul_(scale)],
            [wide[0]],
            [wide[1]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if narrow:
            targets = state["exp_avg"], state["exp_avg_sq"]
            coins = {"key": self._keys[id(copy)], "step": self._counts[id(copy)], "first": self._first[id(copy)]}
            round_moments(wide[0], wide[1], *targets, **coins)
        self.put(copy, weights)
