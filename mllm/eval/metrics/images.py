"""How close is a reconstructed or generated picture to the real one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean

_LUMA = np.array([0.299, 0.587, 0.114])  # BT.601


def _pair(prediction: Any, target: Any, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    given, wanted = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if given.shape != wanted.shape or given.ndim not in (2, 3):
        raise DataError(f"pictures must be (H, W) or (H, W, C) of one shape, got {given.shape} and {wanted.shape}")
    low, high = min(given.min(), wanted.min()), max(given.max(), wanted.max())
    if low < 0 or high > data_range:
        raise DataError(
            f"pixel values {low:g} … {high:g} leave the stated range 0 … {data_range:g}; state the right data_range"
        )
    return given, wanted


def psnr(prediction: Any, target: Any, *, data_range: float) -> float:
    """Peak signal-to-noise ratio of one picture in dB: ``10 log10(data_range² / MSE)``; infinite for equal pictures."""
    given, wanted = _pair(prediction, target, data_range)
    error = float(((given - wanted) ** 2).mean())
    return float("inf") if error == 0 else float(10 * np.log10(data_range**2 / error))


def _blur(plane: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(plane, len(kernel), axis=axis)
        plane = windows @ kernel
    return plane


def ssim(prediction: Any, target: Any, *, data_range: float, channels: Literal["rgb", "luma"] = "rgb") -> float:
    """Structural similarity of one picture (Wang et al. 2004): Gaussian window 11 × 11, sigma 1.5, K1 0.01, K2 0.03,
    population moments, full windows only. ``rgb``: mean over the channels; ``luma``: on BT.601 luma."""
    given, wanted = _pair(prediction, target, data_range)
    if given.ndim == 2:
        planes = [(given, wanted)]
    elif channels == "luma":
        if given.shape[2] != 3:
            raise DataError(f"luma needs 3 channels, got {given.shape[2]}")
        planes = [(given @ _LUMA, wanted @ _LUMA)]
    else:
        planes = [(given[..., k], wanted[..., k]) for k in range(given.shape[2])]
    if min(given.shape[:2]) < 11:
        raise DataError(f"SSIM needs at least 11 × 11 pixels, got {given.shape[0]} × {given.shape[1]}")
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for x, y in planes:
        mx, my = _blur(x, kernel), _blur(y, kernel)
        vx, vy, cov = (_blur(p, kernel) - q for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


def frechet_distance(generated: Any, real: Any) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets ``(N, D)``: ``|m1 - m2|² + tr(S1 + S2 - 2 (S1
    S2)^½)``, float64, unbiased covariance. With an Inception network this is FID; state network, resize, crop and N
    beside the number. Features that are the same for every picture of both sets raise `DataError`: their distance would
    be a perfect 0."""
    sets = []
    for name, features in (("generated", generated), ("real", real)):
        array = np.asarray(features, np.float64)
        if array.ndim != 2 or len(array) < 2:
            raise DataError(f"{name} features must be (N, D) with N of at least 2, got shape {array.shape}")
        sets.append(array)
    if sets[0].shape[1] != sets[1].shape[1]:
        raise DataError(f"feature widths differ: {sets[0].shape[1]} and {sets[1].shape[1]}")
    import torch

    from mllm.visual_tokenizers.evaluate import frechet_distance as distance

    return distance(*map(torch.from_numpy, sets))


class _Picture(Metric):
    reads_text = False
    binary = False
    scale = 1.0

    def __init__(self, data_range: float | None = None):
        if data_range is None or data_range <= 0:
            raise ConfigError(
                f"{self.name}: state data_range (255 for 8-bit pictures, 1 for 0–1 floats), got {data_range}"
            )
        self.data_range = float(data_range)


class Psnr(_Picture):
    """Mean over pictures of each picture's PSNR. A perfect picture is infinite: those are counted, and left out of the
    mean unless all are perfect."""

    name = "psnr"
    protocol = "PSNR per picture, then mean; the value range is stated; equal pictures are counted, not averaged"
    unit = "dB"
    is_mean = False

    def score(self, prediction: Any, target: Any, meta: Mapping[str, Any]) -> Score:
        return Score(psnr(prediction, target, data_range=self.data_range), "", f"range {self.data_range:g}")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        perfect = item.value == float("inf")
        return "", (1.0, float(perfect), 0.0 if perfect else item.value)

    def headline(self, parts: np.ndarray) -> float:
        count, perfect, total = parts.sum(axis=0)
        return float(total / (count - perfect)) if count > perfect else float("inf" if count else "nan")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        finite = [item.value for item in items if item.value != float("inf")]
        score = mean(finite) if finite or not items else float("inf")
        return {"score": score, "perfect": float(len(items) - len(finite))}


class Ssim(_Picture):
    name = "ssim"
    protocol = "SSIM: Gaussian 11 × 11, sigma 1.5, K 0.01 / 0.03, whole windows only, per RGB channel or on luma as stated, then mean"
    unit = ""

    def __init__(self, data_range: float | None = None, channels: Literal["rgb", "luma"] = "rgb"):
        super().__init__(data_range)
        self.channels: Literal["rgb", "luma"] = channels

    def score(self, prediction: Any, target: Any, meta: Mapping[str, Any]) -> Score:
        value = ssim(prediction, target, data_range=self.data_range, channels=self.channels)
        return Score(value, "", f"range {self.data_range:g}, {self.channels}")
