"""Has a part that learns stopped being heard by the loss?"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

WINDOW = 32
"""Steps whose median share is compared: the stage's first (after ``quiet``) with the latest."""
FADED = 0.01


class FadingParts:
    """Watches each part's share of the whole gradient norm, step by step.

    An encoder whose activations grow out of scale takes the gradient from itself and from every encoder beside it, while the
    loss goes on falling by the language model's work alone. It changes nothing in training, so a resumed run needs no memory of it.

    quiet: the stage's first steps, which are not compared: while the rate rises, new parts still find their place.
    """

    def __init__(self, *, quiet: int = 0):
        self.quiet, self.steps = quiet, 0
        self.first: dict[str, list[float]] = {}
        self.latest: dict[str, deque[float]] = {}
        self.faded: dict[str, int] = {}
        """Part → the step at which it was told."""

    def __call__(self, step: int, norms: Mapping[str, float], total: float) -> list[str]:
        """norms: part → norm of its gradient; total: of all. Returns a line for every part that has faded just now."""
        self.steps += 1
        if self.steps <= self.quiet or not total > 0:
            return []
        lines = []
        for part, norm in norms.items():
            share, first = norm / total, self.first.setdefault(part, [])
            if len(first) < WINDOW:
                first.append(share)
                continue
            latest = self.latest.setdefault(part, deque(maxlen=WINDOW))
            latest.append(share)
            before, now = median(first), median(latest)
            if part not in self.faded and len(latest) == WINDOW and before > 0 and now < FADED * before:
                self.faded[part] = step
                lines.append(_line(part, before, now, step))
        return lines


def _line(part: str, before: float, now: float, step: int) -> str:
    return (
        f"{part} has faded: its share of the gradient's norm was {before:.2g} and is {now:.2g} (step {step}). The loss hardly depends "
        "on it any more, as where activations, its own or those of a part beside it, grew out of scale. Train again, or go on from an "
        "earlier checkpoint, with a smaller rate for the part that grew, or with connector.feature_norm: layer_norm where it is an encoder"
    )
