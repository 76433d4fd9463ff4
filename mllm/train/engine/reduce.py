"""How are the gradients of several processes summed while the backward pass still runs?

As in torch's DistributedDataParallel, gradients travel as soon as they are there, in their own type. Unlike it, they are
summed (and not averaged), large ones in place (no second copy of all gradients is held), a parameter may go without a gradient on some
processes or on all, a loss may come from several forward passes, and the model is not wrapped, so names and checkpoints
stay as they are. Two processes' bf16 gradients are summed exactly as in fp32 and rounded once; more are rounded at every hop, as
they are by DistributedDataParallel and DeepSpeed. ``benchmarks/train_ddp.py --cases`` shows which of this DistributedDataParallel refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALONE_ELEMENTS = 1 << 20
"""Gradients of at least so many elements travel by themselves and in place; smaller ones share a copy."""
_SHARED_ELEMENTS = 1 << 24


@dataclass
class _Flight:
    """What is under way: ``flat`` holds the sum of several gradients, or is None where the gradient itself is summed."""

    bucket: list[nn.Parameter]
    flat: Tensor | None
    work: Any


class OverlappedSum:
    """Sums the gradients of ``parameters`` over all processes, from the last one's on: that is the order in which a
    backward pass makes them."""

    def __init__(self, parameters: Sequence[nn.Parameter], alone_elements: int = ALONE_ELEMENTS):
        self.buckets = _buckets(parameters, alone_elements)
        self._place = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._waiting: list[int] = []
        self._next = 0
        self._active = False
        self._running: list[_Flight] = []
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters]

    def start(self) -> None:
        """The next backward pass is the last before the update: send gradients as they come."""
        self._waiting = [len(bucket) for bucket in self.buckets]
        self._next, self._active = 0, True

    def finish(self) -> None:
        """Send what is left, with zeros where there is no gradient, and wait for all. Every process must call it."""
        if not self._active:
            self.start()
        self._active = False
        for bucket in self.buckets[self._next :]:
            self._send(bucket)
        for flight in self._running:
            _receive(flight)
        self._running = []

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._active:
            return
        self._waiting[self._place[id(parameter)]] -= 1
        # All processes must send in one order, so a bucket waits for those before it.
        while self._next < len(self.buckets) and self._waiting[self._next] == 0:
            self._send(self.buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, bucket: list[nn.Parameter]) -> None:
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [p.grad for p in bucket]  # type: ignore[misc]
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        flat = None if alone else torch.cat([gradient.flatten() for gradient in gradients])
        travels = gradients[0] if flat is None else flat
        self._running.append(_Flight(bucket, flat, dist.all_reduce(travels, async_op=True)))


@torch.no_grad()
def _receive(flight: _Flight) -> None:
    flight.work.wait()
    if flight.flat is not None:
        for parameter, part in zip(flight.bucket, flight.flat.split([p.numel() for p in flight.bucket])):
            parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


def _buckets(parameters: Sequence[nn.Parameter], alone: int) -> list[list[nn.Parameter]]:
    """Large parameters one by one from the last to the first, then the small ones, as many as share one copy and one type."""
    result = [[p] for p in reversed(parameters) if p.numel() >= alone]
    size, kind = 0, None
    for parameter in (p for p in reversed(parameters) if p.numel() < alone):
        if kind != parameter.dtype or size >= _SHARED_ELEMENTS:
            result.append([])
            size, kind = 0, parameter.dtype
        result[-1].append(parameter)
        size += parameter.numel()
    return result
