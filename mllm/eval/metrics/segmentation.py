"""How well does a predicted mask cover the right one (RefCOCO, ReasonSeg, gRefCOCO)?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics.base import Mean, Metric, Score, Scored
from mllm.processing.mask_files import decode_rle, read_mask, reasonseg_mask

IGNORE = 255
_EPS = 1e-5
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class MaskIou(Metric):
    """Masks of one size: predictions are booleans (or logits, marked above 0; None: no mask was given), targets hold 0, 1 and 255,
    where nothing is counted. Headline: cIoU. From a run, a prediction is the text of an answer with masks (their union counts), a target
    what `read_mask` takes or a ReasonSeg annotation (``{"shapes": […]}``), of the size in ``meta``.

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
        given, wanted = counted_masks(prediction, target, meta)
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

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        parts = item.score.parts
        summed = float(self.rule == "lisa" or not parts["no_target"])
        return "", (1.0, summed * parts["intersection"], summed * parts["union"])

    def headline(self, parts: np.ndarray) -> float:
        count, inside, union = parts.sum(axis=0)
        return float(self.scale * (inside / (union + _EPS) if union else 1.0)) if count else float("nan")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        inside = union = 0.0
        dice, overlap, over = Mean(), Mean(), {threshold: Mean() for threshold in _THRESHOLDS}
        without, with_target = Mean(), Mean()
        for item in items:
            parts = item.score.parts
            if self.rule == "lisa" or not parts["no_target"]:
                inside, union = inside + parts["intersection"], union + parts["union"]
            dice.append(parts["dice"])
            overlap.append(item.value)
            for threshold, share in over.items():
                share.append(float(item.value > threshold))
            if parts["no_target"]:
                without.append(parts["no_mask"])
            else:
                with_target.append(1 - parts["no_mask"])
        total = self.scale * (inside / (union + _EPS) if union else 1.0) if dice.count else float("nan")
        result = {"score": total, "ciou": total, "giou": self.scale * overlap.value, "dice": self.scale * dice.value}
        result |= {f"p@{threshold}": self.scale * share.value for threshold, share in over.items()}
        if without.count:
            result |= {"n_acc": self.scale * without.value, "t_acc": self.scale * with_target.value}
        return result


def counted_masks(prediction: Any, target: Any, meta: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What was marked and what was to be, ``(height, width)`` of bool, without pixels that do not count. Raises `DataError` for unlike
    sizes."""
    wanted = _target(target, meta)
    given = _given(prediction, wanted.shape)
    given = given if given.dtype == bool else given > 0
    if given.shape != wanted.shape:
        raise DataError(f"predicted mask is {given.shape}, the target is {wanted.shape}; resize the prediction first")
    counts = wanted != IGNORE
    return given & counts, (wanted == 1) & counts


def _target(target: Any, meta: Mapping[str, Any]) -> np.ndarray:
    """A task's target as ``(height, width)`` of 0, 1 and 255."""
    if not isinstance(target, Mapping):
        return np.asarray(target)
    height, width = (int(meta.get(side) or 0) for side in ("height", "width"))
    if not height or not width:
        raise DataError(
            "a metric of masks needs meta.width and meta.height, the picture's size in pixels, to draw the target"
        )
    if "shapes" in target:
        return reasonseg_mask(target, (height, width))
    return read_mask(target, (height, width), where="target")


def _given(prediction: Any, size: tuple[int, ...]) -> np.ndarray:
    """The union of an answer's masks; an answer that is no object with masks marks nothing."""
    if isinstance(prediction, str):
        try:
            entries = json.loads(prediction)["masks"]
        except (ValueError, KeyError, TypeError):
            entries = []
        masks = [decode_rle(entry, where="prediction") > 0 for entry in entries]
        prediction = np.logical_or.reduce(masks) if masks else None
    return np.zeros(size, bool) if prediction is None else np.asarray(prediction)
