"""Does a router use its experts while it learns, or has it collapsed onto one?"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm import distributed
from mllm.models.routing import routing_probabilities
from mllm.routers.losses import entropy
from mllm.types import Routing

if TYPE_CHECKING:
    from mllm.train.engine.trainable import TrainableModel

_log = logging.getLogger(__name__)
COLLAPSE = 0.95
"""Share of the choices from which one expert counts as the only one."""
_MOST_EXPERTS = 12  # sets of more experts than that are not counted: 2¹² numbers a record
ENOUGH = 128
"""Images to look at together. Two such looks in a row must agree before anything is said: a router that begins may lean."""


class RoutingMonitor:
    """Sums up what a router chooses between two records (what it learned: random choices of ``explore`` do not count), and,
    given the model, which sets of experts really ran on its images, chosen, explored or fixed."""

    def __init__(self, router: Any, model: nn.Module | None = None):
        self.router, self.experts = router, tuple(router.experts)
        self.sets: torch.Tensor | None = None
        self._model_handle = model.register_forward_hook(self._count_sets) if model is not None else None
        self.sums: torch.Tensor | None = None
        self.suspect = self.warned = ""
        self.ran: dict[str, int] = {}
        """Of the whole stage (since this start): set of experts → images it ran on."""
        self._recent = [0.0] * (len(self.experts) + 1)
        self._handle = router.register_forward_hook(self._listen)

    def _listen(self, _: Any, __: Any, routing: Any) -> None:
        if not isinstance(routing, Routing) or routing.logits is None or not len(routing.weights):
            return
        if not any(p.requires_grad for p in self.router.parameters()):
            return
        with torch.no_grad():
            probabilities = routing_probabilities(routing)
            chosen = torch.zeros_like(probabilities)
            chosen.scatter_(1, probabilities.topk(self.router.config.top_k, dim=-1).indices, 1.0)
            own = entropy(probabilities).sum()[None]
            count = probabilities.new_tensor([float(len(probabilities))])
            part = torch.cat([probabilities.sum(0), chosen.sum(0), own, count]).double()
            self.sums = part if self.sums is None else self.sums + part

    def _count_sets(self, _: Any, __: Any, output: Any) -> None:
        routing = getattr(output, "routing", None)
        if not isinstance(routing, Routing) or not len(routing.weights) or len(self.experts) > _MOST_EXPERTS:
            return
        with torch.no_grad():
            ran = routing.weights.detach() > 0
            code = (ran * (2 ** torch.arange(len(self.experts), device=ran.device))).sum(1)
            if self.sets is None:
                self.sets = torch.zeros(2 ** len(self.experts), dtype=torch.long, device=ran.device)
            self.sets.index_add_(0, code, torch.ones_like(code))

    def _sets_report(self) -> dict[str, int]:
        if len(self.experts) > _MOST_EXPERTS:
            return {}
        own = [0] * 2 ** len(self.experts) if self.sets is None else self.sets.tolist()
        self.sets = None
        counts = distributed.sum_numbers([float(n) for n in own])
        found = {
            "+".join(name for bit, name in enumerate(self.experts) if code >> bit & 1) or "none": int(count)
            for code, count in enumerate(counts)
            if count
        }
        self.ran = {name: self.ran.get(name, 0) + found.get(name, 0) for name in {**self.ran, **found}}
        return found

    def report(self) -> dict[str, Any]:
        """``{"routing": …}`` for the record, over all processes since the last one; all of them must call it. ``use``: share of
        the choices by expert; ``spread``: entropy of the mean distribution, 0 one expert, 1 all alike; ``doubt``: mean entropy of
        each image's own, 0 certain, 1 undecided; ``ran``: images by the set of experts that ran on them. Logs a warning when one
        expert takes (almost) all."""
        size, sets = len(self.experts), self._sets_report()
        ran = {"ran": sets} if sets else {}
        own = [0.0] * (2 * size + 2) if self.sums is None else self.sums.tolist()
        self.sums = None
        total = distributed.sum_numbers(own)
        images = total[-1]
        if not images:
            return {"routing": ran} if ran else {}
        probabilities = [value / images for value in total[:size]]
        choices = sum(total[size : 2 * size]) or 1.0
        use = {name: value / choices for name, value in zip(self.experts, total[size : 2 * size])}
        most = math.log(size) if size > 1 else 1.0
        spread = -sum(p * math.log(p) for p in probabilities if p > 0) / most
        self._recent = [a + b for a, b in zip(self._recent, [*total[size : 2 * size], images])]
        self._warn()
        return {
            "routing": {"use": use, "spread": spread, "doubt": total[-2] / images / most, "images": int(images), **ran}
        }

    def _warn(self) -> None:
        """Look at the images since the last look, once there are enough."""
        *counts, images = self._recent
        if images < ENOUGH:
            return
        self._recent = [0.0] * len(self._recent)
        share, name = max((count / images, name) for count, name in zip(counts, self.experts))
        if len(counts) == self.router.config.top_k or share < COLLAPSE or sum(counts) / images - share > 1 - COLLAPSE:
            self.suspect = self.warned = ""
            return
        before, self.suspect = self.suspect, name
        if before != name:
            return
        if self.warned != name and distributed.is_main():
            _log.warning(
                "router collapse: %.0f %% of the last %d images go to expert %r and almost none to %s. If the data do need the others, "
                "raise the weight of losses: batch_entropy or load_balance, set explore, or train the router on labels (a stage of kind "
                "routing)",
                100 * share,
                images,
                name,
                ", ".join(other for other in self.experts if other != name),
            )
        self.warned = name

    def close(self) -> None:
        self._handle.remove()
        if self._model_handle is not None:
            self._model_handle.remove()


def watch_routing(model: TrainableModel) -> RoutingMonitor | None:
    """A monitor for a model with a router; None for all others."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    router = getattr(tower, "router", None)
    return RoutingMonitor(router, model) if router is not None else None
