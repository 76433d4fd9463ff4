"""How do processes share a language model's weights in plain torch, as under ZeRO-3, and yet run compiled layers?

Each of the decoder's repeated layers is a unit of `torch.distributed.fsdp.fully_shard`: a process keeps some rows of each of its weights.
The layer is gathered for its forward and for its backward pass while the one before it computes, and its gradients are summed and scattered
while the next one computes, in every micro-batch: kept whole until the last one, they would take what sharing saves. Every process runs
each of these layers once a pass, so nobody waits for nobody. All else (embedding, output head, encoders, connector, heads) runs where there
is something to run it on, and stays whole, as under ``none``.

An update sees ordinary tensors: of what is shared, the process's own rows, in the same memory (`Rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mllm.train.engine.base import Engine, Fragment, free_memory, host_copy
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import build_optimizer
from mllm.train.engine.reduce import OverlappedSum
from mllm.train.engine.shares import own_rows
from mllm.train.engine.units import layers_to_share


@dataclass(frozen=True)
class Rows:
    """What this process has of a parameter that learns. own: its rows, in the memory of ``parameter``; start: the place of their first
    element in the flattened parameter."""

    parameter: DTensor
    own: nn.Parameter
    start: int


class Fsdp2Engine(Engine):
    """Layers of the language model in shares, all else as replicas."""

    shares_weights = True

    def _start(self, groups: list[Group]) -> None:
        learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._rows = {name: _rows(p) for name, p in learning.items() if isinstance(p, DTensor)}
        self.starts = {name: rows.start for name, rows in self._rows.items()}
        rest = {name: p for name, p in learning.items() if name not in self._rows}
        for parameter in rest.values():
            dist.broadcast(parameter.data, src=0)
        updated = {**{name: rows.own for name, rows in self._rows.items()}, **rest}
        self.learning = list(updated.values())
        self.names = {id(p): name for name, p in updated.items()}
        # Summed behind the backward pass: within it they would meet the layers' sums in another order where a process has no picture.
        self.reduction = OverlappedSum(list(rest.values()))
        self.optimizer: Any = build_optimizer(
            self.model,
            groups,
            self.stage.optimizer,
            master=self.learning[0].dtype != torch.float32,
            pieces={name: (own, self.starts.get(name, 0)) for name, own in updated.items()},
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`; the layers' gradients are summed in each micro-batch."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> float:
        for rows in self._rows.values():
            gradient: Any = rows.parameter.grad
            rows.own.grad = None if gradient is None else gradient.to_local()
            rows.parameter.grad = None
        return super().step()

    def _norms_and_scale(self) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in self.learning if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square()  # type: ignore[attr-defined]
        if self._rows:
            dist.all_reduce(squares[: len(self._rows)])
        return self._with_scale(squares.sqrt())

    # State ---------------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine.fragments`: the rows that this process has, and a part of what is whole on all."""
        index = 0
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                if name not in self._rows:
                    index += 1
                    if index % self.world_size != self.rank:
                        continue
                if parameter.numel():
                    yield self._whole(name, parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Engine.state_dict`; one weight at a time is whole."""
        state: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                whole = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
                seen[id(value)] = host_copy(whole) if self.rank == 0 else value
            if self.rank == 0:
                state[name] = seen[id(value)]
        return state


def share_layers(model: nn.Module, stage: str, device: torch.device) -> None:
    """Leave this process its rows of the weights of each of the decoder's layers, whether they learn or not. Scalars, and weights that
    several layers have in common, stay whole. The model may lie on the CPU: a layer goes to ``device``, is shared there, and the next
    follows; at last all else goes there.

    Raises `ConfigError` for a model without a row of like layers that every pass runs.
    """
    decoder, layers = layers_to_share(model, stage)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = _kept_whole(model, layers)
    inside = {p for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.to(device)
        for parameter in layer.parameters():
            dist.broadcast(parameter.data, src=0)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    outside = {p for p in decoder.parameters() if not isinstance(p, DTensor)} - inside
    kind = type(decoder)
    fully_shard(
        decoder, mesh=mesh, ignored_params=outside | whole
    )  # without weights: it is where a pass begins and ends
    decoder.__class__ = kind  # transformers looks up by it what a decoder can record
    _move_rest(model, device)
    free_memory()
    units: list[Any] = layers
    for unit, following in zip(units, [*units[1:], None]):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        _fill_unused(unit)
        if following is not None:
            unit.set_modules_to_forward_prefetch([following])


def _kept_whole(model: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Of the layers' parameters: scalars, and those that are in two layers, or in a layer and elsewhere."""
    places: dict[nn.Parameter, int] = {}
    for layer in layers:
        for parameter in layer.parameters():
            places[parameter] = places.get(parameter, 0) + 1
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if id(module) not in inside else ():
            if parameter in places:
                places[parameter] += 1
    return {parameter for parameter, count in places.items() if count > 1 or parameter.dim() == 0}


def _move_rest(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _fill_unused(unit: Any) -> None:
    """A weight that a pass did not use, as an expert that no token chose, gets a gradient of zeros: all processes must scatter the same."""
    if hasattr(unit, "set_reduce_scatter_unused_params"):
        unit.set_reduce_scatter_unused_params(True)
        return
    group: Any = fully_shard.state(unit)._fsdp_param_group  # type: ignore[attr-defined]  # torch 2.11 has no setting for it
    if group is None:
        return
    behind = group.post_backward

    def filled(*given: Any) -> None:
        for part in group.fsdp_params:
            weight: Any = getattr(part, "_unsharded_param", None)
            nothing = weight is not None and weight.grad is None and part.unsharded_accumulated_grad is None
            if weight is not None and nothing and weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        behind(*given)

    group.post_backward = filled


def _rows(parameter: Any) -> Rows:
    own, start = own_rows(parameter)
    return Rows(parameter, nn.Parameter(own), start)
