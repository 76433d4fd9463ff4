"""Does a masked stage teach an encoder from pictures alone, with DMJD's loss and masks, and hand it on?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.encoders import ENCODERS
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.train import run_recipe
from mllm.train.stages.kind import kind_of
from mllm.train.stages.masked.stage import MaskedModel, MaskedOptions
from mllm.train.stages.masked.targets import cells, disjoint_masks, hide, joint_loss, target_of
from tests.golden.fill import check, load
from tests.helpers import TINY_CLIP
from tests.integration.test_train_contrastive import _data
from tests.integration.train_helpers import make_recipe, metrics

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_joint_loss_is_dmjds_with_both_pairs_of_losses():
    meta, inputs, outputs = load(GOLDEN / "dmjd_joint_loss.json")
    given = [torch.from_numpy(inputs[f"input.{name}"]) for name in ("pred", "pred_visible", "target", "mask")]
    have = {}
    for pair, weight in (("l2_smooth", 1.0), ("smooth_l2", meta["ctor"]["theta_second"])):
        have[f"output.{pair}"] = sum(joint_loss(*given, pair=pair, weight=weight)).numpy()[None]
    check(meta, outputs, have)


def test_visible_predictions_are_compared_with_their_own_cells():
    """The authors' own code compares a shuffled order with the raster order."""
    torch.manual_seed(0)
    target = torch.randn(3, 16, 5)
    first, second = disjoint_masks(3, (4, 4), 0.5, 1.0)
    mask = torch.cat([first, second])
    whole = target.repeat(2, 1, 1)
    shown = whole[~mask].view(6, -1, 5)
    assert float(sum(joint_loss(whole, shown, target, mask))) == 0.0
    assert float(joint_loss(whole, shown.flip(1), target, mask)[1]) > 0.1


def test_the_second_view_hides_what_the_first_one_showed():
    torch.manual_seed(0)
    first, second = disjoint_masks(50, (4, 6), 0.5, 1.0)
    assert bool((first ^ second).all()) and first.sum(1).unique().tolist() == [12]
    first, second = disjoint_masks(50, (4, 6), 0.75, 1.0)
    assert bool((first | second).all()) and second.sum(1).unique().tolist() == [18]
    first, second = disjoint_masks(50, (4, 6), 0.5, 0.75)
    assert (first | second).sum(1).unique().tolist() == [18]
    blocks, _ = disjoint_masks(5, (4, 6), 0.5, 1.0, block=2)
    square = blocks.view(5, 2, 2, 3, 2)
    assert torch.equal(square[:, :, :1, :, :1].expand_as(square), square)
    shares = disjoint_masks(400, (4, 4), 0.25, 0.5)[0].float().mean(0)
    assert shares.min() > 0.15 and shares.max() < 0.35, "every cell is hidden as often as others"


def test_targets_tell_what_is_in_a_cell():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, :, :8, 4:] = 1.0  # an upright edge in the upper left cell, and a level one at its foot
    hog = target_of(pixels, (2, 2), "hog").view(4, 3, 9)
    assert hog[0, 0].argmax() == 0 and hog[3, 0].argmax() == 4 and hog.shape == (4, 3, 9)
    rough = torch.randn(2, 3, 16, 24)
    told = target_of(rough, (2, 3), "pixels")
    assert told.shape == (2, 6, 192) and float(told.mean(2).abs().max()) < 1e-5
    both = target_of(rough, (2, 3), "pixels_gradients")
    torch.testing.assert_close(both[..., 192:], target_of(rough, (2, 3), "gradients"))
    assert both.shape == (2, 6, 256) and bool((both[..., 192:] >= 0).all())
    mask = torch.tensor([[True, False, False, False]])
    hidden = cells(hide(torch.ones(1, 3, 8, 8), mask, (2, 2)), (2, 2))
    assert not hidden[0, 0].any() and bool((hidden[0, 1:] == 1).all())


def _recipe(folder, **changes):
    stage = {
        "name": "alone",
        "kind": "masked",
        "steps": 30,
        "batch_size": 8,
        "data": {"format": "llava", "path": _data(folder / "pairs")},
        "learn": {"encoders.semantic": 2e-3},
        "options": {"branch_width": 32, **changes.pop("options", {})},
        **changes,
    }
    after = {"name": "sft", "steps": 1, "learn": {"connector": 1e-3}}
    encoders = {"semantic": TINY_CLIP, "teacher": TINY_CLIP}
    model = {"encoders": encoders, "connector": {"type": "channel_concat"}}
    return make_recipe(folder, stages=[stage, after], model=model)


def test_a_masked_stage_lowers_its_loss_and_hands_its_encoder_on(tmp_path):
    run_recipe(_recipe(tmp_path))
    rows = [row for row in metrics(tmp_path / "run") if row["stage"] == "alone"]
    losses = [float.fromhex(row["loss"]) for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first["head_loss"]) == {"masked/hidden", "masked/visible"}
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("alone", "final")]
    tuned = {k: v for k, v in states[0].items() if "encoders.semantic." in k}
    assert tuned and all(torch.equal(v, states[1][k]) for k, v in tuned.items())
    kept = [k for k in states[0] if "encoders.teacher." in k]
    assert any(not torch.equal(states[0][k], states[0][k.replace("teacher", "semantic")]) for k in kept)
    assert not any("branch" in key for key in states[0])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"options": {"predict_ratio": 0.5}}, "predict_ratio: 0.5 is less than one view hides"),
        ({"options": {"target": "teacher"}}, "go together"),
        ({"learn": {"connector": 1e-3}}, "trains one encoder"),
        ({"packing": True}, "sees pictures only"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(changes, word, tmp_path):
    recipe = _recipe(tmp_path, **changes)
    with pytest.raises(ConfigError, match=word):
        kind_of(recipe.stages[0]).check(recipe.stages[0], recipe)


def test_a_teacher_of_another_encoder_is_told_of_and_wrong_names_are_refused(tmp_path):
    recipe = _recipe(tmp_path, steps=2, options={"target": "teacher", "teacher": "teacher"})
    run_recipe(recipe, output=tmp_path / "taught")
    assert (tmp_path / "taught" / "alone").is_dir()
    wrong = _recipe(tmp_path, steps=2, options={"target": "teacher", "teacher": "semantic"})
    with pytest.raises(ConfigError, match=r"'semantic' is no other encoder of the model \(teacher\)"):
        run_recipe(wrong, output=tmp_path / "wrong")


def test_uni4eye_tells_the_picture_and_its_gradient_map_by_two_decoders(tmp_path):
    eye = {**ENCODERS.get("uni4eye").tiny(), "keep_prefix": False, "image_size": 16}
    stage = {
        "name": "alone",
        "kind": "masked",
        "steps": 20,
        "batch_size": 8,
        "data": {"format": "llava", "path": _data(tmp_path / "pairs")},
        "learn": {"encoders": 3e-3},
        "options": {"target": "pixels_gradients", "branch_width": 32, "decoder_depth": 2},
    }
    run_recipe(make_recipe(tmp_path, stages=[stage], model={"encoders": {"eye": eye}, "connector": {"type": "mlp"}}))
    losses = [float.fromhex(row["loss"]) for row in metrics(tmp_path / "run")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses

    encoder = build_encoder(encoder_config(eye, where="e"))
    options = MaskedOptions(target="pixels_gradients", branch_width=32, decoder_depth=1)
    model = MaskedModel("eye", encoder, options, {"eye": "pixels"})
    picture, gradient = model.hidden_branch
    told = picture.out.out_features, gradient.out.out_features
    assert told == (2 * 48, 2 * 16), "of the two slices that a token of a volume holds"
    tokens = torch.randn(1, 16, 24)
    moved = tokens.clone()
    moved[0, 15] += torch.randn(24)
    assert not torch.allclose(picture(tokens)[0, 0], picture(moved)[0, 0], atol=1e-6), "cells see each other"


def test_volumes_are_masked_patch_by_patch_and_slices_told_apart(tmp_path):
    torch.manual_seed(0)
    eye = build_encoder(encoder_config(ENCODERS.get("uni4eye").tiny(), where="eye")).train()
    eye.restore_buffers()
    seen = []
    eye.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0], kwargs["scene_ids"])), with_kwargs=True)
    model = MaskedModel("eye", eye, MaskedOptions(branch_width=16, target="pixels_gradients"), {"eye": "pixels"})
    # A volume of five slices, a picture, a volume of two; a patch holds two slices.
    numbers = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1])
    found = model(8.0, pixels=torch.randn(8, 3, 16, 20) + 3.0, slice_numbers=numbers)
    found.loss.backward()
    pixels, scenes = seen[0]
    assert scenes.tolist() == [0] * 5 + [1] + [2] * 2 + [3] * 5 + [4] + [5] * 2
    hidden = (cells(pixels, model.grid) == 0).all(2)
    patches = [[0, 1], [2, 3], [4], [5], [6, 7]]
    assert all(torch.equal(hidden[p[0]], hidden[p[-1]]) for p in patches)
    assert len({tuple(hidden[p[0]].tolist()) for p in patches}) > 1, "patches of one volume are hidden apart"
    grads = {name: p.grad for name, p in eye.named_parameters()}
    for name in ("proj.weight", "proj_3d.weight", "pos_embed_3d", "depth_embed_3d"):
        assert grads[f"model.patch_embed.{name}"].abs().sum() > 0, f"{name} does not learn"
    told = torch.arange(16.0).view(4, 1, 4)  # of two slices in both views: what their one token tells of either
    own = model._own(told[[0, 0, 2, 2]], torch.tensor([0, 1]))
    assert own[:, 0].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]


def test_several_pictures_are_a_volume_or_refused(tmp_path):
    from PIL import Image

    from mllm.errors import DataError
    from mllm.train.stages.masked.stage import PictureReader
    from mllm.types import Sample
    from tests.helpers import tiny_model

    _, processor = tiny_model(tmp_path)
    sample = Sample("s", [], [Image.new("RGB", (20, 20), (40 * k, 0, 0)) for k in range(3)])
    with pytest.raises(DataError, match="3 pictures, and a masked stage learns from one a row"):
        PictureReader(processor, ["semantic"]).encode_sample(sample)
    volume = PictureReader(processor, ["semantic"], volumes=True).encode_sample(sample)
    assert volume.num_images == volume.num_supervised == 3 and volume.extras["slice_numbers"].tolist() == [0, 1, 2]
    assert len({float(each[0].mean()) for each in volume.pixels[processor.pixel_keys["semantic"]]}) == 3
