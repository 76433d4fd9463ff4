"""Which elements of the weights does each process own, and how do the others come by them once they are updated?

Parameters stay whole in the model. The elements of a bucket, joined, are cut into one run a process, each as long; a process keeps the
optimizer's state for its run alone. A large parameter is a bucket by itself and its run a view of it, where the elements divide evenly;
small ones share a bucket, whose run is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALONE_ELEMENTS = 1 << 20
"""Gradients of at least so many elements travel by themselves and in place; smaller ones share a copy."""
_SHARED_ELEMENTS = 1 << 24


def buckets_of(parameters: Sequence[nn.Parameter], alone: int) -> list[list[nn.Parameter]]:
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


def reduce_scatter(own: Tensor, whole: Tensor) -> Any:
    """Begin to sum ``whole`` over processes; each receives its run of the sum in ``own``. Returns what is waited for."""
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the newer name
    return scatter(own, whole, async_op=True)


def all_gather(whole: Tensor, own: Tensor) -> Any:
    """Begin to join every process's ``own`` in ``whole``, of which that may be a part. Returns what is waited for."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, own, async_op=True)


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of one parameter's elements that this process owns.

    start, length: of its elements, the parameter flattened; place: where they begin in this process's run of the bucket; weights: the
    elements as the optimizer knows them, of one dimension and the parameter's type.
    """

    parameter: nn.Parameter
    start: int
    length: int
    place: int
    weights: nn.Parameter


class Share:
    """This process's run of some parameters' elements.

    Args:
        parameters: all of one type, on one device.
        rank, world: which process of how many.
    """

    def __init__(self, parameters: list[nn.Parameter], rank: int, world: int):
        self.parameters, self.world = parameters, world
        self.sizes = [p.numel() for p in parameters]
        size = sum(self.sizes)
        self.length = -(-size // world)
        """Elements of a process's run; the last processes' may go beyond the parameters' end."""
        first = parameters[0]
        self.alone = len(parameters) == 1 and first.is_contiguous() and size % world == 0
        """The run is a view of the only parameter."""
        begin = self._begin = rank * self.length
        self.flat: Tensor = (
            first.data.view(-1)[begin : begin + self.length]
            if self.alone
            else self.joined([p.data for p in parameters])[begin : begin + self.length].clone()
        )
        self.pieces: list[Piece] = []
        at = 0
        for parameter, count in zip(parameters, self.sizes):
            low, high = max(at, begin), min(at + count, begin + self.length)
            if low < high:
                part = nn.Parameter(self.flat[low - begin : high - begin], requires_grad=True)
                self.pieces.append(Piece(parameter, low - at, high - low, low - begin, part))
            at += count

    def refresh(self) -> None:
        """Take the run from the parameters, where it is a copy: something else than the optimizer may have changed them."""
        if not self.alone:
            whole = self.joined([p.data for p in self.parameters])
            self.flat.copy_(whole[self._begin : self._begin + self.length])

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each parameter, behind one another, and zeros up to the end of the last process's run; the tensor itself where
        that is the same."""
        rest = self.length * self.world - sum(self.sizes)
        if len(tensors) == 1 and tensors[0].is_contiguous() and not rest:
            return tensors[0].view(-1)
        return torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_zeros(rest)])

    def send(self) -> Gathering:
        """Begin to give the other processes this one's run, and to receive theirs. All processes must, in one order."""
        whole = self.parameters[0].data.view(-1) if self.alone else self.flat.new_empty(self.length * self.world)
        return Gathering(self, whole, all_gather(whole, self.flat))


@dataclass(frozen=True, eq=False)
class Gathering:
    """The runs of all processes on their way to each."""

    share: Share
    whole: Tensor
    work: Any

    def wait(self) -> None:
        """Until the parameters hold them (on a GPU, what is computed from now on waits)."""
        self.work.wait()
        if self.share.alone:
            return
        used = self.whole[: sum(self.share.sizes)].split(self.share.sizes)
        with torch.no_grad():
            for parameter, part in zip(self.share.parameters, used):
                parameter.copy_(part.view_as(parameter))


def cut(parameters: Sequence[nn.Parameter], alone_elements: int = ALONE_ELEMENTS) -> list[Share]:
    """The shares of this process, in the order in which a backward pass makes gradients. Every process must hold the same parameters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [Share(bucket, rank, world) for bucket in buckets_of(parameters, alone_elements)]


def gather(shares: Iterable[Share]) -> None:
    """Make the parameters of all processes what their owners hold. All processes must call it."""
    under_way = [share.send() for share in shares]
    for gathering in under_way:
        gathering.wait()
