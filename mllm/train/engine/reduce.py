"""How are the gradients of several processes summed while the backward pass still runs?

As in torch's DistributedDataParallel, gradients travel in buckets as soon as they are there. Unlike it, they are summed
in fp32 (and not averaged in bf16), a parameter may go without a gradient on some processes or on all, a loss may come
from several forward passes, and the model is not wrapped, so names and checkpoints stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 1 << 25
_IN_FLIGHT = 3
"""Buckets whose fp32 copies exist at once."""


class OverlappedSum:
    """Sums the gradients of ``parameters`` over all processes, from the last one's on: that is the order in which a
    backward pass makes them."""

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_elements: int = BUCKET_ELEMENTS):
        self.buckets = _buckets(parameters, bucket_elements)
        self._place = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._waiting: list[int] = []
        self._next = 0
        self._active = False
        self._running: list[tuple[list[nn.Parameter], Tensor, Any]] = []
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
        self._receive(keep=0)

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
        flat = torch.cat([p.grad.flatten().float() for p in bucket])  # type: ignore[union-attr]
        self._running.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        self._receive(keep=_IN_FLIGHT - 1)

    @torch.no_grad()
    def _receive(self, keep: int) -> None:
        while len(self._running) > keep:
            bucket, flat, work = self._running.pop(0)
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


def _buckets(parameters: Sequence[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, in runs of about ``limit`` elements."""
    result: list[list[nn.Parameter]] = []
    size = limit
    for parameter in reversed(parameters):
        if size >= limit:
            result.append([])
            size = 0
        result[-1].append(parameter)
        size += parameter.numel()
    return result
