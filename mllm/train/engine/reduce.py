"""How are the gradients of several processes summed while the backward pass still runs?

As in torch's DistributedDataParallel, gradients travel as soon as they are there, in their own type. Unlike it, they are
summed (and not averaged), large ones in place (no second copy of all gradients is held), a parameter may go without a gradient on some
processes or on all, a loss may come from several forward passes, and the model is not wrapped, so names and checkpoints
stay as they are. Two processes' bf16 gradients are summed exactly as in fp32 and rounded once; more are rounded at every hop, as
they are by DistributedDataParallel and DeepSpeed. ``benchmarks/train_ddp.py --cases`` shows which of this DistributedDataParallel refuses.

`OverlappedSum` leaves the whole sum with every process, `OverlappedScatter` with each the shares that it owns (`mllm.train.engine.shards`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm.train.engine.shards import ALONE_ELEMENTS, Share, buckets_of, reduce_scatter

IN_FLIGHT_BYTES = 1 << 30
"""Gradients that are on their way to other processes' shares before the oldest of them is waited for, and freed."""


@dataclass
class _Flight:
    """What is under way. flat: for a sum, of several gradients, None where the gradient itself is summed; for a scatter, what this
    process receives of it."""

    number: int
    flat: Tensor | None
    work: Any
    size: int = 0


class _Overlapped:
    """Sends buckets of gradients, from the last parameter's on: that is the order in which a backward pass makes them."""

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]]):
        self.buckets = buckets
        self._place = {id(p): number for number, bucket in enumerate(buckets) for p in bucket}
        self._waiting: list[int] = []
        self._next = 0
        self._active = False
        self._running: deque[_Flight] = deque()
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for bucket in buckets for p in bucket]

    def start(self) -> None:
        """The next backward pass is the last before the update: send gradients as they come."""
        self._waiting = [len(bucket) for bucket in self.buckets]
        self._next, self._active = 0, True

    def finish(self) -> None:
        """Send what is left, with zeros where there is no gradient, and wait for all. Every process must call it."""
        if not self._active:
            self.start()
        self._active = False
        for number in range(self._next, len(self.buckets)):
            self._fill_and_send(number)
        while self._running:
            self._receive(self._running.popleft())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._active:
            return
        self._waiting[self._place[id(parameter)]] -= 1
        # All processes must send in one order, so a bucket waits for those before it.
        while self._next < len(self.buckets) and self._waiting[self._next] == 0:
            self._fill_and_send(self._next)
            self._next += 1

    @torch.no_grad()
    def _fill_and_send(self, number: int) -> None:
        for parameter in self.buckets[number]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [p.grad for p in self.buckets[number]]  # type: ignore[misc]
        self._send(number, gradients)

    def _send(self, number: int, gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _receive(self, flight: _Flight) -> None:
        raise NotImplementedError


class OverlappedSum(_Overlapped):
    """Sums the gradients of ``parameters`` over all processes."""

    def __init__(self, parameters: Sequence[nn.Parameter], alone_elements: int = ALONE_ELEMENTS):
        super().__init__(buckets_of(parameters, alone_elements))

    def _send(self, number: int, gradients: list[Tensor]) -> None:
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        flat = None if alone else torch.cat([gradient.flatten() for gradient in gradients])
        travels = gradients[0] if flat is None else flat
        self._running.append(_Flight(number, flat, dist.all_reduce(travels, async_op=True)))

    @torch.no_grad()
    def _receive(self, flight: _Flight) -> None:
        flight.work.wait()
        bucket = self.buckets[flight.number]
        if flight.flat is not None:
            for parameter, part in zip(bucket, flight.flat.split([p.numel() for p in bucket])):
                parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


class OverlappedScatter(_Overlapped):
    """Sums the gradients of shared parameters over all processes; each receives the sum of what it owns, as the gradient of its pieces.
    The parameters' own gradients are freed on the way, so that they are never there all at once where nothing accumulates."""

    def __init__(self, shares: Sequence[Share], in_flight_bytes: int = IN_FLIGHT_BYTES):
        self.shares, self.in_flight_bytes = shares, in_flight_bytes
        self._flying = 0
        super().__init__([share.parameters for share in shares])

    def _send(self, number: int, gradients: list[Tensor]) -> None:
        share = self.shares[number]
        whole = share.joined(gradients)
        own = whole.new_empty(share.length)
        flight = _Flight(number, own, reduce_scatter(own, whole), whole.numel() * whole.element_size())
        self._running.append(flight)
        self._flying += flight.size
        while self._flying > self.in_flight_bytes and len(self._running) > 1:
            self._receive(self._running.popleft())

    def _receive(self, flight: _Flight) -> None:
        flight.work.wait()
        self._flying -= flight.size
        share = self.shares[flight.number]
        for parameter in share.parameters:
            parameter.grad = None
        assert flight.flat is not None
        for piece in share.pieces:
            piece.weights.grad = flight.flat[piece.place : piece.place + piece.length]
