"""How do several processes share the optimizer's state alone, in plain torch (ZeRO-1, Rajbhandari et al. 2020, arXiv 1910.02054)?

Weights and gradients are whole tensors of the model, as under ``none``, so whatever trains there trains here. Each process owns some
elements of every large weight, and of the small ones together (`mllm.train.engine.shards`): it receives the sum of their gradients while
the backward pass still makes others, updates them alone, with the fused kernel where there is one, and gives them to the others while it
updates the next. Gradients travel in their own type and are summed, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm.train.engine.base import Engine, Fragment
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import OF_BF16, build_optimizer, update_average
from mllm.train.engine.reduce import OverlappedScatter
from mllm.train.engine.shards import ALONE_ELEMENTS, Gathering, Piece, cut, gather


class ShardedEngine(Engine):
    """Replicas of the model, one optimizer over all processes."""

    alone_elements = ALONE_ELEMENTS

    def _start(self, groups: list[Group]) -> None:
        for parameter in self.learning:
            dist.broadcast(parameter.data, src=0)
        self.shares = cut(self.learning, self.alone_elements)
        self.reduction = OverlappedScatter(self.shares)
        self.pieces: list[Piece] = [piece for share in self.shares for piece in share.pieces]
        names = {id(piece): self.names[id(piece.parameter)] for piece in self.pieces}
        self.starts = {names[id(piece)]: piece.start for piece in self.pieces}
        self.optimizer = build_optimizer(
            self.model,
            groups,
            self.stage.optimizer,
            master=self.learning[0].dtype != torch.float32,
            pieces={names[id(piece)]: (piece.weights, piece.start) for piece in self.pieces},
        )
        place = {id(p): number for number, p in enumerate(self.learning)}
        self._places = torch.tensor([place[id(piece.parameter)] for piece in self.pieces], device=self.device)
        self._alone = {id(share.pieces[0].weights): n for n, share in enumerate(self.shares) if share.alone}

    @torch.no_grad()
    def step(self) -> float:
        assert self.reduction is not None
        self.reduction.finish()
        norms, scale = self._norms_and_scale()
        *each, value = norms.tolist()  # the one place where the update waits for the backward pass
        if math.isfinite(value):
            self._update(scale)
        for piece in self.pieces:
            piece.weights.grad = None
        self._part_norms(each)  # the GPU is busy with the update meanwhile
        return value

    def _update(self, scale: Tensor) -> None:
        """Update what this process owns. A large weight is on its way to the others while the next is updated; of these all processes have
        as many, in one order. The small ones follow."""
        under_way: dict[int, Gathering] = {}

        def updated(weights: nn.Parameter) -> None:
            number = self._alone.get(id(weights))
            if number is not None:
                under_way[number] = self.shares[number].send()

        if isinstance(self.optimizer, OF_BF16):
            self.optimizer.step(scale, updated)
        else:
            gradients = [piece.weights.grad for piece in self.pieces if piece.weights.grad is not None]
            if self.stage.optimizer.max_grad_norm is not None and gradients:
                torch._foreach_mul_(gradients, scale)  # type: ignore[attr-defined]
            for share in self.shares:
                share.refresh()
            self.optimizer.step()
        for number, share in enumerate(self.shares):
            if number not in under_way:
                under_way[number] = share.send()
        if self.stage.optimizer.ema is not None:
            update_average(self.optimizer, self.stage.optimizer.ema)
        for gathering in under_way.values():
            gathering.wait()

    def _norms_and_scale(self) -> tuple[Tensor, Tensor]:
        squares = torch.zeros(len(self.learning), dtype=torch.float32, device=self.device)
        gradients = [piece.weights.grad for piece in self.pieces if piece.weights.grad is not None]
        if gradients:
            own = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))  # type: ignore[attr-defined]
            squares[self._places] = own.square()
        dist.all_reduce(squares)
        return self._with_scale(squares.sqrt())

    # State ---------------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine.fragments`."""
        for group in self.optimizer.param_groups:
            for name, weights in zip(group["names"], group["params"]):
                yield self._whole(name, weights)

    def load_fragments(self, read: Callable[[Fragment], None]) -> None:
        super().load_fragments(read)
        gather(self.shares)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine.averaged`; all processes must call it."""
        swapped = self.stage.optimizer.ema is not None and not self.finished
        with super().averaged():
            if swapped:
                gather(self.shares)
            yield
        if swapped:
            gather(self.shares)

    def finish(self) -> None:
        super().finish()
        if self.stage.optimizer.ema is not None:
            gather(self.shares)

    def close(self) -> None:
        self.shares, self.pieces = [], []
        super().close()
