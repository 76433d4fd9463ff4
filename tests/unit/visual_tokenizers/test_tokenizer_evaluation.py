"""Are the scores the standard ones?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import DataError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.evaluate import (
    CodeCounter,
    comparison_grid,
    evaluate_tokenizer,
    frechet_distance,
    linear_probe,
    probe_tokenizer,
    psnr,
    ssim,
)
from mllm.visual_tokenizers.images import augment, load_images, to_pixels
from mllm.visual_tokenizers.recipe import ImagesSpec
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

SPEC = ImagesSpec(type="digits_and_charts", options={"charts": 40})


def pair(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(3, 3, size, size, generator=generator)
    return (real + 0.1 * torch.randn(real.shape, generator=generator)).clamp(0, 1), real


def test_psnr_and_ssim_are_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.image")
    made, real = pair()
    for index in range(3):
        expected = metrics.peak_signal_noise_ratio(made[index], real[index], data_range=1.0)
        assert float(psnr(made, real)[index]) == pytest.approx(float(expected), rel=1e-5)
    expected = metrics.structural_similarity_index_measure(made, real, data_range=1.0, reduction="none")
    # torchmetrics pads by reflection and crops again; the windows that fit wholly are the same.
    assert torch.allclose(ssim(made, real).float(), expected, atol=2e-3)
    assert torch.allclose(ssim(real, real), torch.ones(3, dtype=torch.float64))
    assert (ssim(made, real, data_range=2.0) > ssim(made, real)).all()
    assert math.isinf(float(psnr(real, real)[0]))
    with pytest.raises(DataError, match="11×11"):
        ssim(*pair(8))


def test_frechet_distance_is_the_matrix_square_root_formula():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(200, 5)), generator.normal(0.3, 2, size=(300, 5))
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-8)


def test_linear_probe_separates_what_is_linear_and_guesses_on_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (400,), generator=generator)
    centres = torch.randn(4, 10, generator=generator) * 5
    features = centres[labels] + torch.randn(400, 10, generator=generator)
    assert linear_probe(features[:300], labels[:300], features[300:], labels[300:]) > 0.95
    noise = torch.randn(400, 10, generator=generator)
    assert linear_probe(noise[:300], labels[:300], noise[300:], labels[300:]) < 0.45


def test_usage_and_perplexity_are_counted_over_batches():
    counter = CodeCounter({"pixel": (8, 1)})
    for ids in ([0, 1], [2, 3]):
        counter.add(VisualCodes({"pixel": torch.tensor(ids).view(1, 2, 1)}, (1, 2)))
    summary = counter.summary()["pixel"]
    assert summary["used"] == 0.5 and summary["perplexity"] == pytest.approx(4) and summary["codes_seen"] == 4


def test_digits_and_charts_are_real_reproducible_and_disjoint():
    train, held_out = (load_images(SPEC, 16, split) for split in ("train", "held_out"))
    assert len(train) == 1438 + 40 and len(held_out) == 359 + 10
    again = load_images(SPEC, 16, "train")
    assert torch.equal(train.batch(range(0, 1478, 100)), again.batch(range(0, 1478, 100)))
    assert set(train.labels.tolist()) == set(range(14)) == set(held_out.labels.tolist())
    known = {image.numpy().tobytes() for image in train.batch(range(len(train)))}
    assert not any(image.numpy().tobytes() in known for image in held_out.batch(range(len(held_out))))


def test_folder_images_split_label_and_name_broken_files(tmp_path):
    for index in range(12):
        folder = tmp_path / ("cat" if index % 2 else "dog")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (30 + index, 20), (index * 20, 0, 0)).save(folder / f"{index}.png")
    spec = ImagesSpec(type="folder", options={"path": str(tmp_path), "held_out": 4})
    train, held_out = (load_images(spec, 16, split) for split in ("train", "held_out"))
    assert len(train) == 8 and len(held_out) == 4 and train.classes == ("cat", "dog")
    assert not set(train.files) & set(held_out.files)
    assert train.batch([0, 1]).shape == (2, 3, 16, 16) and train.batch([0]).dtype == torch.uint8
    train.files[0].write_bytes(b"no image")
    with pytest.raises(DataError, match=train.files[0].name):
        train.batch([0])


def test_augmentation_keeps_size_and_range_and_follows_its_generator():
    pixels = to_pixels(load_images(SPEC, 16, "train").batch(range(4)))
    spec = ImagesSpec(type="digits_and_charts", crop=(0.5, 0.9), flip=True)
    first, second = (augment(pixels, spec, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == pixels.shape and torch.equal(first, second) and first.abs().max() <= 1
    assert not torch.equal(first, pixels)
    assert torch.equal(augment(pixels, SPEC, torch.Generator()), pixels)


def test_evaluation_reports_every_number_the_table_needs():
    tokenizer = build_tokenizer(TINY["dualtoken"]).eval()
    images = load_images(SPEC, 16, "held_out")
    result = evaluate_tokenizer(tokenizer, images, limit=6, batch_size=4, features=lambda x: x.mean((2, 3)))
    assert result["images"] == 6 and result["tokens_per_image"] == 64 and result["bits_per_image"] == 256
    assert result["compression"] == pytest.approx(16 * 16 * 24 / 256)
    assert set(result["usage"]) == {"pixel", "semantic"} and result["frechet_distance"] >= 0
    assert result["ssim_data_range_2"] >= result["ssim"]


def test_probe_reads_each_half_of_a_shared_code():
    tokenizer = build_tokenizer(TINY["tokenflow"]).eval()
    spec = ImagesSpec(type="digits_and_charts", options={"charts": 60, "digits": False})
    train, held_out = (load_images(spec, 16, split) for split in ("train", "held_out"))
    result = probe_tokenizer(tokenizer, train, held_out)
    assert set(result) == {"shared", "semantic", "pixel", "all"}
    assert all(0 <= value <= 1 for value in result.values())


def test_the_picture_shows_originals_above_reconstructions():
    tokenizer = build_tokenizer(TINY["vq"]).eval()
    pixels = to_pixels(load_images(SPEC, 16, "held_out").batch(range(3)))
    picture = np.asarray(comparison_grid(tokenizer, pixels, gap=2, least=32))
    assert picture.shape == (2 * 32 + 6, 3 * 34 + 2, 3)
    original = ((pixels[0] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(picture[2:34:2, 2:34:2], original)
