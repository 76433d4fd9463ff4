"""Are pictures turned and changed against the model in training, within their bound, and only there?"""

from __future__ import annotations

import json

import pytest
import torch

from mllm.errors import ConfigError
from mllm.train import run_recipe
from mllm.train.robust import Robust, RobustOptions, turn
from mllm.train.stages.kind import kind_of
from tests.helpers import tiny_model
from tests.integration.train_helpers import make_recipe, metrics


def _batch(model, seed=0):
    torch.manual_seed(seed)
    tower = model.model.vision_tower
    sizes = {name: info.image for name, info in tower.infos.items()}
    keys = Robust(RobustOptions(), model).keys
    pixels = {keys[name]: torch.randn(2, 3, image.height, image.width) for name, image in sizes.items()}
    count = model.config.layout((28, 28)).num_tokens
    ids = torch.tensor([[5, *[model.config.image_token_id] * count, 6, 7, 8]] * 2)
    labels = ids.clone()
    labels[:, : 1 + count] = -100
    return {"input_ids": ids, "labels": labels, **pixels}, list(pixels)


def test_pictures_change_against_the_model_within_the_bound_and_no_parameter_is_moved(tmp_path):
    model, _ = tiny_model(tmp_path)
    model.train()
    inputs, keys = _batch(model)
    seen = []
    robust = Robust(RobustOptions(adversarial=True, epsilon=4, pace=5), model)
    handle = robust.attach(model)
    spy = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    output = model(**inputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = seen[-1]
    for name, info in model.model.vision_tower.infos.items():
        key = robust.keys[name]
        apart = (changed[key] - inputs[key]).abs() * torch.tensor(info.image.std).view(3, 1, 1) * 255
        assert 3.0 < float(apart.max()) <= 4.001, key
    handle.remove()
    plain = model(**inputs).loss
    assert float(output.loss) > float(plain), "one step up the loss makes the batch harder"
    spy.remove()
    handle = robust.attach(model)
    torch.testing.assert_close(model.eval()(**inputs).loss, plain, msg="nothing changes in evaluation")
    handle.remove()
    assert keys


def test_pictures_turn_together_for_all_encoders_by_every_quarter():
    torch.manual_seed(0)
    small, large = torch.arange(16.0).view(1, 1, 4, 4).expand(64, 3, 4, 4), torch.arange(64.0).view(1, 1, 8, 8)
    found = turn({"a": small, "b": large.expand(64, 3, 8, 8)})
    corners = found["a"][:, 0, 0, 0].tolist()
    assert set(corners) == {0.0, 3.0, 12.0, 15.0}
    of_large = {0.0: 0.0, 3.0: 7.0, 12.0: 56.0, 15.0: 63.0}
    assert [of_large[corner] for corner in corners] == found["b"][:, 0, 0, 0].tolist()
    with pytest.raises(ConfigError, match=r"must be squares.*a \(2, 3, 4, 6\)"):
        turn({"a": torch.zeros(2, 3, 4, 6)})


def test_a_stage_learns_from_harder_pictures_and_says_what_does_not_go_together(tmp_path):
    stage = {"name": "sft", "steps": 2, "learn": {"connector": 1e-3}}
    robust = {"options": {"robust": {"rotations": True, "adversarial": True}}}
    run_recipe(make_recipe(tmp_path, stages=[stage]))
    plain = metrics(tmp_path / "run")[0]["loss"]
    run_recipe(make_recipe(tmp_path, stages=[{**stage, **robust}]), output=tmp_path / "robust")
    assert metrics(tmp_path / "robust")[0]["loss"] != plain
    for changes, word in (
        ({"cache_features": True, **robust}, "cache_features: options.robust changes the pictures"),
        ({"options": {"robots": {}}}, "did you mean 'robust'|robust"),
        ({"options": {"robust": {"epsilon": 40}}}, "epsilon"),
    ):
        recipe = make_recipe(tmp_path, stages=[{**stage, **changes}])
        with pytest.raises(ConfigError, match=word):
            kind_of(recipe.stages[0]).check(recipe.stages[0], recipe)


def test_a_stage_teaches_visual_tokens_the_words_of_their_picture(tmp_path):
    stage = {"name": "sft", "steps": 2, "learn": {"connector": 1e-3}, "batch_size": 6}
    run_recipe(make_recipe(tmp_path, stages=[stage]))
    run_recipe(make_recipe(tmp_path, stages=[{**stage, "options": {"word_contrast": 0.5}}]), output=tmp_path / "words")
    plain, taught = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("run", "words")
    )
    words = taught["head_loss"]["word_contrast"]
    assert "head_loss" not in plain and words > 0
    assert taught["loss"] == pytest.approx(plain["loss"] + 0.5 * words, abs=1e-4)
