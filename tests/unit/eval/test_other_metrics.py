"""Do the table, spatial, box, mask and picture metrics give the values worked out by hand?"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics import Score, Scored, build_metric
from mllm.eval.metrics.anls import similarity
from mllm.eval.metrics.images import frechet_distance, psnr, ssim
from mllm.eval.metrics.tables import _key_similarities
from mllm.eval.metrics.vsibench import (
    NumberOrChoice,
    clean_answer,
    mean_relative_accuracy,
    mean_relative_accuracy_fp32,
    think_then_answer,
)
from mllm.processing.mask_files import encode_rle
from tests.golden.fill import check, load, texts

GOLDEN = Path(__file__).parents[2] / "golden"


# VSI-Bench ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [(5, 5, 1.0), (4, 5, 0.6), (3, 5, 0.3), (2.5, 5, 0.1), (2, 5, 0.0), (0, 0, 1.0), (1, 0, 0.0)],
)
def test_mean_relative_accuracy_in_double_precision(prediction, target, expected):
    assert mean_relative_accuracy(prediction, target) == pytest.approx(expected)


def test_fp32_mean_relative_accuracy_matches_the_published_vectors():
    meta, inputs, outputs = load(GOLDEN / "vsibench_mra.json")
    got = [
        mean_relative_accuracy_fp32(p, t)
        for p, t in zip(inputs["input.pred"].tolist(), inputs["input.target"].tolist())
    ]
    check(meta, outputs, {"output.mra": np.asarray(got, np.float32)})


def test_reward_reading_matches_the_published_vectors():
    meta, _, outputs = load(GOLDEN / "vsibench_reward.json")
    metric = build_metric("vsibench_reward")
    rows = list(zip(texts(meta), texts(meta, "truth"), texts(meta, "question_type")))
    width = outputs["output.cleaned"].shape[1]
    codes = [[ord(c) for c in clean_answer(text)] for text, _, _ in rows]
    cleaned = np.array([row + [-1] * (width - len(row)) for row in codes], np.int64)
    scores = [metric.score(text, truth, {"question_type": kind}).value or 0.0 for text, truth, kind in rows]
    check(meta, outputs, {"output.cleaned": cleaned, "output.reward": np.asarray(scores, np.float32)})


@pytest.mark.parametrize(
    ("reply", "target", "kind", "value"),
    [
        ("<answer>4</answer>", "5", None, 0.6),
        ("1,000.", "1000", None, 1.0),
        ("b.", "B", None, 1.0),
        ("bed", "B", None, 0.0),
        ("five", "5", None, None),
        ("2", "2", "route_planning", 1.0),
        ("3", "2", "route_planning", 0.0),
    ],
)
def test_rows_without_a_kind_are_rewarded_by_what_their_answer_is(reply, target, kind, value):
    found = NumberOrChoice().score(reply, target, {} if kind is None else {"question_type": kind}).value
    assert found == (value if value is None else pytest.approx(value, abs=0.11))


def test_the_form_of_an_answer_is_rewarded_alone():
    told = [
        "<think>so\nfar</think>\n<answer>4</answer>",
        "<answer>4</answer>",
        "4",
        "<think>a</think><answer>4</answer> m",
    ]
    assert think_then_answer([[{"role": "assistant", "content": one}] for one in told]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reply", "value"), [("5m", None), ("five", None), ("5,", None), (" 5", None), ("5. ok", 1.0), ("5", 1.0)]
)
def test_vsibench_reads_the_first_token(reply, value):
    assert build_metric("vsibench").score(reply, "5", {"question_type": "object_counting"}).value == value


def test_vsibench_choices_and_unknown_kind():
    metric = build_metric("vsibench")
    assert metric.score("A. left", "A", {"question_type": "route_planning"}).value == 1.0
    assert metric.score("(A)", "A", {"question_type": "route_planning"}).value == 0.0
    with pytest.raises(DataError, match="question_type"):
        metric.score("A", "A", {"question_type": "colour"})


def test_vsibench_counts_the_three_directions_as_one_task():
    rows = [
        ("object_rel_direction_easy", 1),
        ("object_rel_direction_hard", 0),
        ("object_counting", 0.5),
        ("route_planning", 0),
    ]
    items = [Scored(str(k), Score(float(v)), "A", {"question_type": t}) for k, (t, v) in enumerate(rows)]
    totals = build_metric("vsibench").aggregate(items)
    assert totals["object_rel_direction"] == 50.0 and totals["score"] == pytest.approx(100 / 3)


# Tables ---------------------------------------------------------------------------------------------------------------

TARGET = "title | my table\nyear | argentina | brazil\n1999 | 200 | 158"


def test_rms_of_an_equal_and_of_a_transposed_table_is_1():
    metric = build_metric("rms_f1")
    assert metric.score(TARGET, [TARGET], {}).value == pytest.approx(1.0)
    transposed = "title | my table\ncountry | 1999\nargentina | 200\nbrazil | 158"
    target = "title | my table\nyear | argentina | brazil\n1999 | 200 | 158"
    rows = "title | my table\nyear | 1999\nargentina | 200\nbrazil | 158"
    assert metric.score(rows, [target], {}).value == pytest.approx(1.0)
    assert metric.score(transposed, [target], {}).extracted == "transposed"


def test_rms_reads_the_likeness_of_keys_as_strict_anls_does():
    generator = random.Random(0)
    wanted, given = (
        list(dict.fromkeys("".join(generator.choices("abc ", k=generator.randint(0, most))) for _ in range(40)))
        for most in (8, 19)
    )
    expected = [[similarity(key, other, strict=True) for other in given] for key in wanted]
    assert _key_similarities(wanted, given).tolist() == expected


def test_rms_partial_credit_worked_by_hand():
    # title and argentina equal; brazil 1.19 % off: 1 - 0.01 = 0.99 of a point. 2.99 of 3.
    prediction = "title | my table\nyear | argentina | brazil\n1999 | 200 | 159.58"
    score = build_metric("rms_f1").score(prediction, [TARGET], {})
    assert score.value == pytest.approx(2.99 / 3)
    # exactly 10 % off counts nothing: 2 of 3
    prediction = "title | my table\nyear | argentina | brazil\n1999 | 220 | 158"
    assert build_metric("rms_f1").score(prediction, [TARGET], {}).value == pytest.approx(2 / 3)


def test_rms_precision_recall_and_upstreams_name_for_recall():
    prediction = "year | argentina\n1999 | 200"
    score = build_metric("rms_f1").score(prediction, [TARGET], {})
    assert score.parts["precision"] == pytest.approx(1.0) and score.parts["recall"] == pytest.approx(1 / 3)
    assert score.value == pytest.approx(0.5)
    compat = build_metric({"name": "rms_f1", "upstream_compat": True})
    assert compat.score(prediction, [TARGET], {}).value == pytest.approx(1 / 3)
    assert build_metric("rms_f1").score("", [TARGET], {}).value == 0.0
    assert build_metric("rms_f1").score("", [""], {}).value == 1.0


def test_rms_reads_newline_tokens_and_needs_spaces_around_bars():
    assert build_metric("rms_f1").score(TARGET.replace("\n", "<0x0A>"), [TARGET], {}).value == pytest.approx(1.0)
    assert build_metric("rms_f1").score("year|argentina\n1999|200", [TARGET], {}).value == 0.0


def test_rnss_worked_by_hand():
    # numbers 1 2 3 4 against 1 2 3 2: cost 0 + 0 + 0 + 0.5, of 4
    target, prediction = "a | b\n1 | 2\n3 | 4", "a | b\n1 | 2\n3 | 2"
    assert build_metric("rnss").score(prediction, [target], {}).value == pytest.approx(0.875)
    assert build_metric("rnss").score("5%", ["10%"], {}).value == 1.0  # percent cells are no numbers on either side
    assert build_metric("rnss").score("x", ["1 | 2"], {}).value == 0.0


def test_rnss_meets_a_zero_with_zero_where_deplots_code_does_the_reverse():
    ours, theirs = build_metric("rnss"), build_metric({"name": "rnss", "upstream_compat": True})
    assert (ours.score("0", ["0"], {}).value, theirs.score("0", ["0"], {}).value) == (1.0, 0.0)
    assert (ours.score("7", ["0"], {}).value, theirs.score("7", ["0"], {}).value) == (0.0, 1.0)
    assert ours.score("3", ["4"], {}).value == theirs.score("3", ["4"], {}).value == 0.75
    assert "upstream_compat" in ours.protocol and theirs.label == "rnss(upstream_compat=True) v1"


@pytest.mark.parametrize(
    ("name", "words"),
    [("box_iou", "brackets"), ("vsibench", "negative target"), ("rms_f1", "<0x0A>"), ("rnss", "<0x0A>")]
    + [(name, "single human answer") for name in ("vqa_evalai", "vqa_official", "textvqa_m4c")],
)
def test_a_deviation_kept_on_purpose_is_stated_in_the_protocol(name, words):
    assert words in build_metric(name).protocol


# Boxes and masks ------------------------------------------------------------------------------------------------------

SIZE = {"width": 100, "height": 50}


def test_box_iou_under_each_convention():
    box = [10, 10, 20, 20]  # x y w h → 10 10 30 30
    for name, reply in (
        ("fraction", "[0.1, 0.2, 0.3, 0.6]"),
        ("thousandth", "(100,200),(300,600)"),
        ("pixel", "<10, 10, 30, 30>"),
    ):
        score = build_metric({"name": "box_iou", "coordinates": name}).score(reply, box, SIZE)
        assert score.value == 1.0 and score.parts["iou"] == pytest.approx(1.0) and name in score.rule


def test_box_reversed_corners_missing_box_and_half_overlap():
    metric = build_metric({"name": "box_iou", "coordinates": "pixel", "target_format": "xyxy"})
    assert "swapped" in metric.score("[30, 30, 10, 10]", [10, 10, 30, 30], SIZE).rule
    assert metric.score("no idea", [10, 10, 30, 30], SIZE).value is None
    half = metric.score("[10, 10, 20, 30]", [10, 10, 30, 30], SIZE)
    assert half.parts["iou"] == pytest.approx(0.5) and half.value == 1.0 and half.parts["center"] == 1.0
    totals = metric.aggregate([Scored("1", half, None, {}), Scored("2", Score(None), None, {})])
    assert totals["score"] == 50.0 and totals["iou"] == 25.0 and totals["acc@0.7"] == 0.0 and totals["acc@0.5"] == 50.0


def test_box_needs_a_stated_convention_and_the_image_size():
    with pytest.raises(ConfigError, match="coordinates"):
        build_metric({"name": "box_iou", "coordinates": "guess"})
    with pytest.raises(DataError, match="width"):
        build_metric("box_iou").score("[0,0,1,1]", [0, 0, 1, 1], {})


def test_mask_ciou_and_giou_worked_by_hand():
    metric = build_metric("mask_iou")
    a, b, empty = np.zeros((4, 4), bool), np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True  # 8 and 8 pixels, 4 shared, union 12
    items = [Scored("1", metric.score(a, b, {}), None, {}), Scored("2", metric.score(empty, empty, {}), None, {})]
    totals = metric.aggregate(items)
    assert totals["ciou"] == pytest.approx(100 / 3) and totals["giou"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    with pytest.raises(DataError, match="resize"):
        metric.score(a, np.zeros((2, 2)), {})


# Pictures -------------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    black, grey = np.zeros((8, 8, 3)), np.full((8, 8, 3), 25.5)
    assert psnr(grey, black, data_range=255) == pytest.approx(20.0)
    assert psnr(black, black, data_range=1) == math.inf
    with pytest.raises(DataError, match="stated range"):
        psnr(grey, black, data_range=1)


def test_psnr_metric_averages_per_picture_and_counts_perfect_ones():
    metric = build_metric({"name": "psnr", "data_range": 1})
    zero = np.zeros((4, 4))
    scores = [metric.score(np.full((4, 4), level), zero, {}) for level in (0.1, 0.01, 0.0)]
    totals = metric.aggregate([Scored(str(k), s, None, {}) for k, s in enumerate(scores)])
    assert totals["score"] == pytest.approx(30.0) and totals["perfect"] == 1.0
    with pytest.raises(ConfigError, match="data_range"):
        build_metric("psnr")


def test_ssim_agrees_with_scipys_gaussian_filter_on_the_inner_pixels():
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(0)
    a = generator.random((40, 32, 3))
    b = np.clip(a + 0.1 * generator.standard_normal(a.shape), 0, 1)

    def blur(plane):
        return gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    values = []
    for x, y in ((a[..., k], b[..., k]) for k in range(3)):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        values.append(((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())
    assert ssim(a, b, data_range=1) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(a, a, data_range=1) == pytest.approx(1.0)
    assert 0 < ssim(a, b, data_range=1, channels="luma") < 1
    assert ssim(255 * a, 255 * b, data_range=255) == pytest.approx(ssim(a, b, data_range=1))


@pytest.mark.parametrize("shape", [(40, 32, 3), (11, 57, 3), (64, 48, 1)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_and_ssim_agree_with_torchmetrics(shape, data_range):
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    import torch

    generator = np.random.default_rng(3)
    ramp = np.linspace(0, 1, shape[1])[None, :, None] * np.ones(shape)
    a = np.clip(ramp + 0.2 * generator.standard_normal(shape), 0, 1) * data_range
    b = np.clip(a + 0.05 * data_range * generator.standard_normal(shape), 0, data_range)
    x, y = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (a, b))
    expected = torchmetrics.peak_signal_noise_ratio(x, y, data_range=data_range).item()
    assert psnr(a, b, data_range=data_range) == pytest.approx(expected, abs=1e-5) and 20 < expected < 35
    _, windows = torchmetrics.structural_similarity_index_measure(
        x, y, data_range=data_range, sigma=1.5, return_full_image=True
    )
    expected = (
        windows[..., 5:-5, 5:-5].mean().item()
    )  # it mirrors the borders; ours, as published, has whole windows only
    assert ssim(a, b, data_range=data_range) == pytest.approx(expected, abs=1e-6) and 0.3 < expected < 0.99


def test_frechet_distance_of_known_gaussians():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # exactly N(0, I)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x + 2.0, x) == pytest.approx(12.0)
    assert frechet_distance(3 * x, x) == pytest.approx(3 * (3 - 1) ** 2)
    with pytest.raises(DataError, match="widths differ"):
        frechet_distance(x[:, :2], x)
    with pytest.raises(DataError, match="same features"):
        frechet_distance(np.ones((5, 3)), np.ones((7, 3)))
    assert frechet_distance(np.ones((5, 3)), 2 * np.ones((7, 3))) == pytest.approx(3.0)


def test_frechet_distance_agrees_with_scipys_matrix_root():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(2)
    a, b = (
        generator.standard_normal((50, 6)) @ generator.standard_normal((6, 6)),
        generator.standard_normal((60, 6)) + 1,
    )
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_of_wide_and_of_few_features():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(4)
    mixing = generator.standard_normal((64, 64)) / 8
    a, b = generator.standard_normal((300, 64)) @ mixing, 0.5 + generator.standard_normal((280, 64)) @ mixing.T
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9) == frechet_distance(b, a)
    # fewer samples than features: the covariances are singular, where the root of the product is ill-conditioned
    few, other = a[:20], b[:30]
    s, t = np.cov(few, rowvar=False), np.cov(other, rowvar=False)
    expected = ((few.mean(0) - other.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(few, other) == pytest.approx(expected, rel=1e-5)


def test_j_and_f_of_clips_are_those_of_davis_own_rule():
    """Beside a slow reading of it: contours as seg2bmap finds them, pixels within a disk, empty frames, void pixels, means by clip."""
    rng, metric = np.random.default_rng(3), build_metric("j_and_f")
    height, width, reach = 60, 80, 1  # ceil(0.008 * 100)

    def blob(x, y, size):
        rows, columns = np.mgrid[:height, :width]
        return (abs(rows - y) < size) & (abs(columns - x) < size * 1.3)

    def edge(mask):
        last = lambda i, n: min(i + 1, n - 1)  # noqa: E731
        return {
            (i, j)
            for i in range(height)
            for j in range(width)
            if mask[i, j] != mask[i, last(j, width)] or mask[i, j] != mask[last(i, height), j]
            or mask[i, j] != mask[last(i, height), last(j, width)]
        }  # fmt: skip

    def near(one, other):
        disk = [(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1) if a * a + b * b <= reach**2]
        return sum(any((i + a, j + b) in other for a, b in disk) for i, j in one) / len(one)

    items, expected = [], {"a": [], "b": []}
    for number in range(8):
        clip = "ab"[number > 4]
        wanted, given = blob(30, 25, 12).astype(np.uint8), blob(30 + number, 25 + number % 3, 12 - number // 4)
        wanted[50:, :] = 255
        given |= (rng.random(given.shape) < 0.02) & (np.arange(height)[:, None] >= 50)  # void: does not count
        if number in (2, 3):
            wanted[wanted == 1] = 0
        if number == 3:
            given[:50] = False
        seen, right = given & (wanted != 255), wanted == 1
        union = (seen | right).sum()
        first, second = edge(seen), edge(right)
        found = (
            [near(first, second), near(second, first)] if first and second else [float(bool(first) == bool(second))] * 2
        )
        f = 2 * found[0] * found[1] / sum(found) if sum(found) else 0.0
        expected[clip].append(((seen & right).sum() / union if union else 1.0, f))
        score = metric.score(given, wanted, {"clip": clip})
        assert (score.parts["j"], score.parts["f"]) == pytest.approx(expected[clip][-1], abs=1e-12), number
        items.append(Scored(str(number), score, None, {"clip": clip}))
    means = np.mean(
        [np.mean(frames, axis=0) for frames in expected.values()], axis=0
    )  # clips weigh the same, of 5 and 3 frames
    totals = metric.aggregate(items)
    assert (totals["j"], totals["f"]) == pytest.approx(tuple(100 * means)) and totals["clips"] == 2
    assert totals["score"] == pytest.approx(50 * means.sum()) and 1.0 in [frame[1] for frame in expected["a"]]
    text = json.dumps({"text": "It is [SEG].", "masks": [encode_rle(blob(30, 25, 12))]})
    size = {"clip": "a", "width": width, "height": height}
    assert metric.score(text, encode_rle(blob(30, 25, 12)), size).value == 1
    with pytest.raises(DataError, match="clip"):
        metric.score(given, wanted, {})


def test_masks_of_an_answers_text_are_scored_against_files_annotations():
    metric, size = build_metric("mask_iou"), {"width": 6, "height": 4}
    marked = np.zeros((4, 6), bool)
    marked[1:3, 1:4] = True
    half = marked.copy()
    half[:, 3] = False
    text = json.dumps({"text": "It is [SEG].", "masks": [encode_rle(half), encode_rle(marked & ~half)]})
    square = {"polygons": [[1, 1, 4, 1, 4, 3, 1, 3]]}  # COCO's rule: six pixels
    assert metric.score(text, square, size).value == pytest.approx(1, abs=1e-4)
    assert metric.score(text, encode_rle(marked), size).value == pytest.approx(1, abs=1e-4)
    for nothing in ("", "no mask", json.dumps({"text": "None.", "masks": []})):
        assert metric.score(nothing, square, size).parts["no_mask"] == 1
    shapes = [{"label": "target", "points": [[1, 1], [3, 1], [3, 2], [1, 2]]}]
    ignored = [*shapes, {"label": "ignore", "points": [[5, 0], [5, 3], [5, 3]]}]
    spill = marked.copy()
    spill[:, 5] = True
    spilled = json.dumps({"text": "", "masks": [encode_rle(spill)]})
    assert metric.score(spilled, {"shapes": shapes}, size).value < 0.7
    assert metric.score(spilled, {"shapes": ignored}, size).value == pytest.approx(1, abs=1e-4)
    with pytest.raises(DataError, match="width"):
        metric.score(text, square, {})
