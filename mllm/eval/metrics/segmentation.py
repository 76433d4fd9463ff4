"""How well does a predicted mask cover the right one (RefCOCO, ReasonSeg, gRefCOCO)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean

IGNORE = 255
_EPS = 1e-5
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class MaskIou(Metric):
    """Masks of one size: predictions are booleans (or logits, marked above 0; None: no mask was given), targets hold 0, 1 and 255,
    where nothing is counted. Headline: cIoU.

    rule: whose cIoU and gIoU. ``lisa``: IoU is I / (U + 1e-5), 1 where neither marks anything; every sample counts in both.
    ``grefcoco``: a sample without target is 1 in gIoU where nothing is marked, else 0, and is left out of cIoU. smallest: a prediction
    of fewer pixels is no mask (``grefcoco``: 50).
    """

    name = "mask_iou"
    version = "2"
    protocol = (
        "segmentation: cIoU = sum of intersections / sum of unions, gIoU = mean IoU, pixels of 255 left out; N-acc and T-acc are the "
        "shares of samples without and with a target that are taken for such"
    )
    binary = False
    is_mean = False
    reads_text = False

    def __init__(self, rule: Literal["lisa", "grefcoco"] = "lisa", smallest: int | None = None):
        if rule not in ("lisa", "grefcoco"):
            raise ConfigError(f"mask_iou: rule {rule!r}; expected lisa or grefcoco")
        self.rule = rule
        self.smallest = (50 if rule == "grefcoco" else 1) if smallest is None else smallest

    def score(self, prediction: Any, target: Any, meta: Mapping[str, Any]) -> Score:
        wanted = np.asarray(target)
        given = np.zeros(wanted.shape, bool) if prediction is None else np.asarray(prediction)
        given = given if given.dtype == bool else given > 0
        if given.shape != wanted.shape:
            raise DataError(
                f"predicted mask is {given.shape}, the target is {wanted.shape}; resize the prediction first"
            )
        counts = wanted != IGNORE
        wanted, given = (wanted == 1) & counts, given & counts
        marked = int(given.sum())
        if marked < self.smallest:
            given, marked = np.zeros_like(given), 0
        inside, union = float((given & wanted).sum()), float((given | wanted).sum())
        empty = not wanted.any()
        value = inside / (union + _EPS) if union else 1.0
        return Score(
            value,
            f"{marked} pixels",
            self.rule,
            {
                "intersection": inside,
                "union": union,
                "dice": 2 * inside / (union + inside) if union else 1.0,
                "no_target": float(empty),
                "no_mask": float(marked == 0),
            },
        )

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        parts = [item.score.parts for item in items]
        summed = [p for p in parts if self.rule == "lisa" or not p["no_target"]]
        inside, union = (sum(p[name] for p in summed) for name in ("intersection", "union"))
        total = float("nan") if not items else self.scale * (inside / (union + _EPS) if union else 1.0)
        result = {"score": total, "ciou": total, "giou": self.scale * mean([item.value for item in items])}
        result["dice"] = self.scale * mean([p["dice"] for p in parts])
        result |= {f"p@{t}": self.scale * mean([float(item.value > t) for item in items]) for t in _THRESHOLDS}
        without = [p["no_mask"] for p in parts if p["no_target"]]
        if without:
            result["n_acc"] = self.scale * mean(without)
            result["t_acc"] = self.scale * mean([1 - p["no_mask"] for p in parts if not p["no_target"]])
        return result
