"""Does a router use its experts while it learns, or has it collapsed onto one?"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from mllm import distributed
from mllm.models.routing import routing_probabilities
from mllm.routers.losses import entropy
from mllm.types import Routing

_log = logging.getLogger(__name__)
COLLAPSE = 0.95
"""Share of the choices from which one expert counts as the only one."""
ENOUGH = 128
"""Images to look at together. Two such looks in a row must agree before anything is said: a router that begins may lean."""


class RoutingMonitor:
    """Sums up what a learned router chooses between two records. Listens to the router itself, so fixed and random routings
    (``explore``) do not count."""

    def __init__(self, router: Any):
        self.router, self.experts = router, tuple(router.experts)
        self.sums: torch.Tensor | None = None
        self.suspect = self.warned = ""
        self._recent = [0.0] * (len(self.experts) + 1)
        self._handle = router.register_forward_hook(self._listen)

    def _listen(self, _: Any, __: Any, routing: Any) -> None:
        if not isinstance(routing, Routing) or routing.logits is None or not len(routing.weights):
            return
        with torch.no_grad():
            probabilities = routing_probabilities(routing)
            chosen = torch.zeros_like(probabilities)
            chosen.scatter_(1, probabilities.topk(self.router.config.top_k, dim=-1).indices, 1.0)
            own = entropy(probabilities).sum()[None]
            count = probabilities.new_tensor([float(len(probabilities))])
            part = torch.cat([probabilities.sum(0), chosen.sum(0), own, count]).double()
            self.sums = part if self.sums is None else self.sums + part

    def report(self) -> dict[str, Any]:
        """``{"routing": …}`` for the record, over all processes since the last one; all of them must call it. ``use``: share of
        the choices by expert; ``spread``: entropy of the mean distribution, 0 one expert, 1 all alike; ``doubt``: mean entropy of
        each image's own, 0 certain, 1 undecided. Logs a warning when one expert takes (almost) all."""
        size = len(self.experts)
        own = [0.0] * (2 * size + 2) if self.sums is None else self.sums.tolist()
        self.sums = None
        total = distributed.sum_numbers(own)
        images = total[-1]
        if not images:
            return {}
        probabilities = [value / images for value in total[:size]]
        choices = sum(total[size : 2 * size]) or 1.0
        use = {name: value / choices for name, value in zip(self.experts, total[size : 2 * size])}
        most = math.log(size) if size > 1 else 1.0
        spread = -sum(p * math.log(p) for p in probabilities if p > 0) / most
        self._recent = [a + b for a, b in zip(self._recent, [*total[size : 2 * size], images])]
        self._warn()
        return {"routing": {"use": use, "spread": spread, "doubt": total[-2] / images / most, "images": int(images)}}

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


def watch_routing(model: Any) -> RoutingMonitor | None:
    """A monitor for a model whose router learns; None for all others."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    router = getattr(tower, "router", None)
    return RoutingMonitor(router) if router is not None and any(p.requires_grad for p in router.parameters()) else None
