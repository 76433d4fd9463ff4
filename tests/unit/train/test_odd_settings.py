"""Are settings that are each legal and mean nothing together told, and sensible ones left alone?"""

from __future__ import annotations

import pytest

from mllm.odd_settings import odd_settings
from mllm.recipe import StageSpec


def stage(**settings) -> StageSpec:
    length = {} if "epochs" in settings else {"steps": 100}
    return StageSpec.model_validate({"name": "s", "learn": {"connector": 1e-3}, "data": "d", **length, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": {"warmup": 100}}, "warmup 100 is not shorter than the 100 steps: the rate rises to the last one"),
        ({"schedule": {"warmup": 2000}}, "warmup 2,000 is not shorter than the 100 steps"),
        ({"schedule": {"type": "constant", "minimum": 0.1}}, "a constant rate has none"),
        ({"save_every": 101}, "save_every 101 is beyond the 100 steps: no checkpoint"),
        ({"log_every": 500}, "log_every 500 is beyond the 100 steps: only the last step is logged"),
        ({"epochs": 0.1}, "epochs 0.1 of 64 samples are 6.4, less than the 8 of one step"),
        ({"draw": {"prompts": ["a"], "every": 200}}, "draw.every 200 is beyond the 100 steps"),
        ({"kind": "grpo", "options": {"trl": {"epsilon": 0.1}}}, "options.trl.epsilon clips nothing"),
    ],
)
def test_each_combination_is_named_with_its_numbers(settings, expected):
    (line,) = odd_settings(stage(**settings), steps=100, samples=64, rows=8)
    assert expected in line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": {"warmup": 99}},
        {"schedule": {"warmup": 0.99}},
        {"schedule": {"warmup": 0}},
        {"save_every": 100, "log_every": 100},
        {"epochs": 0.125},
        {"kind": "grpo", "options": {"trl": {"epsilon": 0.1, "num_iterations": 2}}},
        {"group_by_length": True},
    ],
)
def test_sensible_settings_are_left_alone(settings):
    assert odd_settings(stage(**settings), steps=100, samples=64, rows=8) == []


def test_one_step_needs_no_warm_up_and_one_sample_no_groups():
    assert odd_settings(stage(schedule={"warmup": 0.03}), steps=1, samples=8, rows=8) == []
    assert "groups nothing" in odd_settings(stage(group_by_length=True), steps=100, samples=8, rows=1)[0]


def test_a_tokenizers_settings_are_told_too():
    from mllm.train.stages.tokenizer.stage import odd_tokenizer_settings
    from mllm.visual_tokenizers.recipe import load_training

    training = load_training("tokenizer_demo_single", ["stages.tokenizer.options.evaluate_every=50"])
    told = odd_tokenizer_settings(training, 40)
    assert told == ["options.evaluate_every 50 is beyond the 40 steps: it is evaluated at its end only"]
    assert odd_tokenizer_settings(training, 400) == []
    assert any("warmup 50 is not shorter" in line for line in odd_settings(training.stage, steps=40))
