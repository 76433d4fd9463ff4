"""How well does a predicted box or mask cover the right one (RefCOCO, RefCOCO+, RefCOCOg)?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean

Box = tuple[float, float, float, float]
_NUM = r"((?:-|(?<!\d))\d++(?:\.\d++)?)"
_COMMA = r"\s*+,\s*+"
_BOX = re.compile(rf"{_NUM}{_COMMA}{_NUM}\s*+(?:\)\s*+)?,\s*+(?:\(\s*+)?{_NUM}{_COMMA}{_NUM}")
_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def read_box(reply: str) -> Box | None:
    """The first four numbers parted by commas, in any kind of brackets; None when there are none."""
    found = _BOX.search(reply)
    return None if found is None else tuple(float(part) for part in found.groups())  # type: ignore[return-value]


def box_iou(left: Box, right: Box) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes with ordered corners; 0 when both are empty."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    inside = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)) - inside
    return inside / union if union > 0 else 0.0


class BoxIou(Metric):
    """Accuracy at IoU 0.5 of a box written in the reply; the target is in pixels, ``meta`` has ``width`` and
    ``height``.

    coordinates: what the model's numbers mean: ``fraction`` (0–1), ``thousandth`` (0–1000) or ``pixel``. It is never
    guessed: a guess misreads small boxes. target_format: ``xywh`` (COCO) or ``xyxy``.
    """

    name = "box_iou"
    protocol = (
        "referring-expression accuracy at IoU 0.5; the first four numbers parted by commas, in any or no brackets "
        "(lmms-eval wants square ones); the model's coordinate convention is stated, reversed corners are swapped"
    )

    def __init__(
        self,
        coordinates: Literal["fraction", "thousandth", "pixel"] = "fraction",
        target_format: Literal["xywh", "xyxy"] = "xywh",
    ):
        if coordinates not in ("fraction", "thousandth", "pixel") or target_format not in ("xywh", "xyxy"):
            raise ConfigError(
                f"box_iou: coordinates {coordinates!r} / target_format {target_format!r}; "
                "expected fraction, thousandth or pixel / xywh or xyxy"
            )
        self.coordinates, self.target_format = coordinates, target_format

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        width, height = (float(meta.get(side) or 0) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            raise DataError("box_iou needs meta.width and meta.height, the image's size in pixels")
        if not isinstance(target, list | tuple) or len(target) != 4:
            raise DataError(f"target {target!r} is not a box of four numbers")
        x, y, c, d = (float(value) for value in target)
        wanted = (x, y, x + c, y + d) if self.target_format == "xywh" else (x, y, c, d)
        box = read_box(prediction)
        if box is None:
            return Score(None, "", "no box", {"iou": 0.0, "center": 0.0})
        unit = {"fraction": (width, height), "thousandth": (width / 1000, height / 1000), "pixel": (1.0, 1.0)}[
            self.coordinates
        ]
        x0, y0, x1, y1 = box[0] * unit[0], box[1] * unit[1], box[2] * unit[0], box[3] * unit[1]
        reversed_ = x1 < x0 or y1 < y0
        pixels = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        iou = box_iou(pixels, wanted)
        middle = ((pixels[0] + pixels[2]) / 2, (pixels[1] + pixels[3]) / 2)
        inside = wanted[0] <= middle[0] <= wanted[2] and wanted[1] <= middle[1] <= wanted[3]
        rule = f"first box, {self.coordinates}" + (", corners swapped" if reversed_ else "")
        return Score(float(iou >= 0.5), str(list(box)), rule, {"iou": iou, "center": float(inside)})

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        overlaps = [float(item.score.parts.get("iou", 0.0)) for item in items]
        result = super().aggregate(items) | {"iou": self.scale * mean(overlaps)}
        result |= {f"acc@{t}": self.scale * mean([float(iou >= t) for iou in overlaps]) for t in _THRESHOLDS}
        return result | {"center": self.scale * mean(float(item.score.parts.get("center", 0.0)) for item in items)}
