"""How good is a visual tokenizer?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import DataError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import VisualTokenizer, as_unit_range
from mllm.visual_tokenizers.images import ImageSource, to_pixels


def _double(x: Tensor) -> Tensor:
    """``x`` in fp64; on the CPU where its device has none (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def psnr(made: Tensor, real: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image ``(B, …)``, in dB; identical images give infinity."""
    error = (_double(made) - _double(real)).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(made: Tensor, real: Tensor, *, data_range: float = 1.0, padded: bool = False) -> Tensor:
    """Structural similarity of each image ``(B, C, H, W)`` (Wang et al. 2004): Gaussian window of 11, σ 1.5, K 0.01
    and 0.03, over positions where the whole window fits, channels averaged. Images smaller than the window raise
    `DataError`. padded: over all positions, with zeros around the image (as losses of Gaussian splatting do).

    ``data_range`` is the largest difference of two values: 1.0 for [0, 1]. TokenFlow's published numbers use 2.0 on
    [0, 1] images, which inflates them.
    """
    if min(made.shape[-2:]) < 11:
        raise DataError(f"SSIM needs images of at least 11×11, got {tuple(made.shape[-2:])}")
    channels = made.shape[1]
    a, b = _double(made), _double(real)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None]).expand(channels, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=channels, padding=5 if padded else 0)  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of two sets of features ``(n, D)`` as Gaussians: ``|μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)``. With
    Inception features of real and reconstructed images this is rFID; other features give other numbers. Raises
    `DataError` for fewer than two images, and for a network that gives every image of both sets the same features:
    its distance would be a perfect 0."""
    if min(len(first), len(second)) < 2:
        raise DataError(f"a Fréchet distance needs at least 2 images, got {len(first)} and {len(second)}")
    a, b = _double(first), _double(second)
    if bool((a == a[0]).all() and (b == a[0]).all()):
        raise DataError("the network gives every image the same features: a Fréchet distance of them says nothing")
    difference = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    # The eigenvalues of Σ₁Σ₂ are those of the symmetric Σ₁^½ Σ₂ Σ₁^½.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def predict_linear(train: Tensor, train_labels: Tensor, test: Tensor, *, decay: float = 1e-3) -> Tensor:
    """Classes ``(m,)`` that multinomial logistic regression on ``train`` ``(n, D)`` predicts for ``test`` ``(m, D)``;
    see `linear_probe`."""
    train, test = _double(train), _double(test)
    train_labels = train_labels.to(train.device)
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(train_labels.max()) + 1
    weight = torch.zeros(train.shape[1], classes, dtype=torch.float64, device=train.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (test @ weight + bias).argmax(1)


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, decay: float = 1e-3
) -> float:
    """Accuracy in [0, 1] of multinomial logistic regression from features ``(n, D)``, standardised on the training set.

    Full-batch L-BFGS on the penalised likelihood (``decay/2 · |W|²`` per sample): deterministic, no rate to tune.
    """
    predicted = predict_linear(train, train_labels, test, decay=decay)
    return float(_double(predicted == test_labels.to(predicted.device)).mean())


class CodeCounter:
    """Counts codes over many images: usage and perplexity of each codebook."""

    def __init__(self, codebooks: dict[str, tuple[int, int]]):
        self.sizes = {name: size for name, (size, _) in codebooks.items()}
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in codebooks}

    def add(self, codes: VisualCodes) -> None:
        for name, ids in codes.codes.items():
            values, counts = torch.unique(ids, return_counts=True)
            self.counts[name].update(dict(zip(values.tolist(), counts.tolist())))

    def summary(self) -> dict[str, dict[str, float]]:
        """Codebook → ``used`` (share of its codes that occurred), ``perplexity``, ``codes_seen``."""
        out = {}
        for name, counter in self.counts.items():
            counts = torch.tensor(list(counter.values()), dtype=torch.float64)
            share = counts / counts.sum()
            perplexity = float(torch.exp(-(share * share.log()).sum()))
            used = len(counter) / self.sizes[name]
            out[name] = {"used": used, "perplexity": perplexity, "codes_seen": int(counts.sum())}
        return out


Decode = Callable[[VisualCodes], Tensor]
"""codes → pixels ``(B, 3, H, W)`` in [-1, 1]."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures in [-1, 1] twice → ``(B,)``."""


class _Scores:
    """What one decoder's pictures are worth beside the real ones, which 8-bit files would hold."""

    def __init__(self, features: Callable[[Tensor], Tensor] | None, distances: Mapping[str, Distance]):
        self.features, self.distances = features, distances
        self.values: dict[str, list[Tensor]] = {}
        self.made: list[Tensor] = []

    def add(self, pixels: Tensor, real: Tensor) -> None:
        """pixels: as decoded, in [-1, 1]; real: in [0, 1]."""
        made = (as_unit_range(pixels) * 255).round() / 255
        found = {
            "psnr": psnr(made, real),
            "ssim": ssim(made, real),
            "ssim_data_range_2": ssim(made, real, data_range=2.0),
        }
        found |= {name: distance(made * 2 - 1, real * 2 - 1) for name, distance in self.distances.items()}
        for name, value in found.items():
            self.values.setdefault(name, []).append(value)
        if self.features is not None:
            self.made.append(self.features(made * 2 - 1))

    def summary(self, real_features: list[Tensor]) -> dict[str, float]:
        result = {name: float(torch.cat(values).mean()) for name, values in self.values.items()}
        if self.features is not None:
            result["frechet_distance"] = frechet_distance(torch.cat(real_features), torch.cat(self.made))
        return result


def feature_distance(tokens: Callable[[Tensor], Tensor]) -> Distance:
    """As LPIPS does on one layer of any network (arXiv 1801.03924): features ``(B, N, D)`` scaled to length 1 at every position, their
    squared differences summed over channels and averaged over positions."""

    def distance(made: Tensor, real: Tensor) -> Tensor:
        first, second = (F.normalize(tokens(x).float(), dim=-1) for x in (made, real))
        return (first - second).square().sum(-1).mean(1)

    return distance


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: VisualTokenizer,
    images: ImageSource,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    distances: Mapping[str, Distance] | None = None,
    decoders: Mapping[str, Decode] | None = None,
) -> dict[str, Any]:
    """Scores on ``images``; pictures are compared as 8-bit files would be.

    psnr (dB, mean over images), ssim (data range 1) and ssim_data_range_2, tokens and bits per image, compression
    against 24-bit pixels, usage per codebook. features: pixels in [-1, 1] → ``(B, D)``; adds the Fréchet distance
    of reconstructions under that network. distances: by name, means over images. decoders: by name, other ways from the same
    codes to pixels; each gets the same scores under ``decoders``.
    """
    device = tokenizer.last_layer().device
    number = len(images) if limit is None else min(limit, len(images))
    counter = CodeCounter(tokenizer.codebooks)
    ways: dict[str, Decode] = {"": tokenizer.decode, **(decoders or {})}
    scores = {name: _Scores(features, distances or {}) for name in ways}
    real_features = []
    for start in range(0, number, batch_size):
        pixels = to_pixels(images.batch(range(start, min(start + batch_size, number))), device)
        codes = tokenizer.encode(pixels)
        counter.add(codes)
        real = as_unit_range(pixels)
        for name, decode in ways.items():
            scores[name].add(decode(codes), real)
        if features is not None:
            real_features.append(features(real * 2 - 1))
    raw = tokenizer.image.height * tokenizer.image.width * 24
    plain = scores[""].summary(real_features)
    distance = {"frechet_distance": plain.pop("frechet_distance")} if features is not None else {}
    result: dict[str, Any] = {
        "images": number,
        **plain,
        "tokens_per_image": tokenizer.tokens_per_image,
        "bits_per_image": tokenizer.bits_per_image,
        "compression": raw / tokenizer.bits_per_image,
        "usage": counter.summary(),
        **distance,
    }
    if decoders:
        result["decoders"] = {name: scores[name].summary(real_features) for name in decoders}
    return result


@torch.no_grad()
def code_features(
    tokenizer: VisualTokenizer, images: ImageSource, *, batch_size: int = 64, pool: bool = True
) -> dict[str, Tensor]:
    """Codebook → what its quantised vectors say of every image: their mean over positions ``(n, D)``, or all of them
    ``(n, N · D)``; ``all``: the codebooks side by side."""
    device = tokenizer.last_layer().device
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images.batch(range(start, min(start + batch_size, len(images)))), device)
        vectors = tokenizer.embed(tokenizer.encode(pixels))
        if hasattr(tokenizer, "split"):
            vectors = {**vectors, **tokenizer.split(vectors["shared"])}  # type: ignore[operator]
        for name, value in vectors.items():
            found.setdefault(name, []).append((value.mean(1) if pool else value.flatten(1)).cpu())
    joined = {name: torch.cat(values) for name, values in found.items()}
    joined["all"] = torch.cat([joined[name] for name in tokenizer.codebooks], 1)
    return joined


def probe_tokenizer(
    tokenizer: VisualTokenizer, train: ImageSource, held_out: ImageSource, *, pool: bool = True, batch_size: int = 64
) -> dict[str, float]:
    """Held-out linear-probe accuracy from the quantised features of each codebook (or half) and of all together."""
    if train.labels is None or held_out.labels is None:
        raise DataError("a linear probe needs images with classes")
    device = tokenizer.last_layer().device
    a, b = (code_features(tokenizer, images, pool=pool, batch_size=batch_size) for images in (train, held_out))
    return {name: linear_probe(a[name].to(device), train.labels, b[name].to(device), held_out.labels) for name in a}


@torch.no_grad()
def comparison_grid(
    tokenizer: VisualTokenizer,
    pixels: Tensor,
    *,
    gap: int = 2,
    least: int = 64,
    decoders: Mapping[str, Decode] | None = None,
) -> Image.Image:
    """Originals above, reconstructions below, then what other decoders make of the same codes. Small images are enlarged (nearest) to at
    least ``least`` pixels."""
    pixels = pixels.to(tokenizer.last_layer().device)
    codes = tokenizer.encode(pixels)
    shown = [pixels, tokenizer.decode(codes), *(decode(codes) for decode in (decoders or {}).values())]
    rows = [(as_unit_range(x) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for x in shown]
    factor = max(1, -(-least // pixels.shape[-1]))
    side = pixels.shape[-1] * factor
    height = len(rows) * (side + gap) + gap
    sheet = np.full((height, len(pixels) * (side + gap) + gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = gap + r * (side + gap), gap + c * (side + gap)
            sheet[top : top + side, left : left + side] = image.repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(sheet)
