"""How well do masks follow what they mark through a clip: J (region) and F (contour), as DAVIS counts them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean
from mllm.eval.metrics.segmentation import counted_masks


class JAndF(Metric):
    """A sample is one frame of a clip, asked for by itself; ``meta.clip`` names the clip together with what is followed in it (an object,
    an expression). Masks as `MaskIou` takes them. J is the IoU of a frame, 1 where neither marks anything; F the harmonic mean of the
    shares of either's contour within ``tolerance`` of the other's (times the diagonal, rounded up to pixels). Both are averaged over a
    clip's frames, then over clips; headline: the mean of the two.

    DAVIS' semi-supervised track leaves out each clip's first and last frame: leave these out of the task's data for its numbers.
    """

    name = "j_and_f"
    protocol = (
        "DAVIS: J = IoU of a frame, F = contours within 0.008 of the diagonal; means over a clip's frames, then over clips; J&F = "
        "their mean; pixels of 255 left out"
    )
    binary = False
    is_mean = False
    group_key = "clip"
    reads_text = False
    example = ([[0, 1], [0, 1]], {"clip": "a", "width": 2, "height": 2})

    def __init__(self, tolerance: float = 0.008):
        if not 0 < tolerance < 1:
            raise ConfigError(
                f"j_and_f: tolerance {tolerance}; expected a share of the diagonal between 0 and 1 (DAVIS: 0.008)"
            )
        self.tolerance = tolerance

    def score(self, prediction: Any, target: Any, meta: Mapping[str, Any]) -> Score:
        if meta.get("clip") is None:
            raise DataError("j_and_f needs meta.clip: which clip, and what in it, a frame belongs to")
        given, wanted = counted_masks(prediction, target, meta)
        union = int((given | wanted).sum())
        region = float((given & wanted).sum()) / union if union else 1.0
        edge = contour_f(given, wanted, float(np.ceil(self.tolerance * np.hypot(*wanted.shape))))
        return Score((region + edge) / 2, f"{int(given.sum())} pixels", "davis", {"j": region, "f": edge})

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return "", (1.0, item.value)

    def joined(self, sums: np.ndarray) -> np.ndarray:
        return np.stack([np.ones(len(sums)), sums[:, 1] / sums[:, 0]], axis=1)

    def headline(self, parts: np.ndarray) -> float:
        clips, both = parts.sum(axis=0)
        return float(self.scale * both / clips) if clips else float("nan")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        clips: dict[str, list[Scored]] = {}
        for item in items:
            clips.setdefault(str(item.meta.get("clip")), []).append(item)

        def over(value: Callable[[Scored], float]) -> float:
            return self.scale * mean(mean(value(item) for item in frames) for frames in clips.values())

        both, j, f = (
            over(lambda item: item.value),
            over(lambda item: item.score.parts.get("j", 0.0)),
            over(lambda item: item.score.parts.get("f", 0.0)),
        )
        return {"score": both, "j_and_f": both, "j": j, "f": f, "clips": float(len(clips))}


def contour_f(given: np.ndarray, wanted: np.ndarray, reach: float) -> float:
    """Two masks ``(height, width)`` of bool → the harmonic mean of the shares of each one's contour that lies within ``reach`` pixels of
    the other's; 1 where neither has a contour, 0 where one has none."""
    from scipy.ndimage import distance_transform_edt

    first, second = contour(given), contour(wanted)
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    precision = float((np.asarray(distance_transform_edt(~second))[first] <= reach).mean())
    recall = float((np.asarray(distance_transform_edt(~first))[second] <= reach).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels ``(height, width)`` that differ from the one to the right, below, or right below; the last row and column go on beyond the
    picture."""
    wider = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ wider[:-1, 1:]) | (mask ^ wider[1:, :-1]) | (mask ^ wider[1:, 1:])
