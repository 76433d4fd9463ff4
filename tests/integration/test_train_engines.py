"""Do several processes compute what one does, whatever the engine and whichever rank has pictures?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train import run_recipe
from mllm.train.engine.zero import ZeroEngine
from tests.integration.kill_points import in_a_process
from tests.integration.train_helpers import make_recipe, metrics, small_is_large

PARTITION_ALL = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
OFFLOADED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
}
_CALM = {
    "steps": 3,
    "gradient_accumulation": 2,
    "optimizer": {"eps": 1e-5},
}  # Adam turns rounding noise in near-zero gradients into whole steps otherwise
SPLIT = 160  # tokens: about two thirds of the micro-batches of two samples have more
ROUTED = {"router": {"type": "gate", "experts": ["detail"], "top_k": 1}}
PARTITION_SOON = {"zero_optimization": {**PARTITION_ALL["zero_optimization"], "reduce_bucket_size": 2048}}
"""Gradients travel as soon as a few of them are there, so an order that differs between ranks would show."""


def _recipe(folder, engines, learns, batch_size, **changes):
    stages = [
        {"name": f"stage{i}", "batch_size": batch_size, "engine": engine, "learn": learn, **_CALM}
        for i, (engine, learn) in enumerate(zip(engines, learns))
    ]
    recipe = make_recipe(folder, stages=stages, **changes)
    recipe.model.language_model.config["attention_dropout"] = 0.0
    return recipe


LEARNS = [
    {"language_model": 1e-3, "connector": 3e-3, "encoders": 1e-3},
    {"connector": 3e-3, "encoders.detail": {"lr": 1e-3, "last_layers": 1}},
    {"language_model": 1e-3},
    {"language_model": {"lr": 1e-3, "lora": {"r": 4}}, "connector": 1e-3},
    {"language_model": 1e-3, "connector": 3e-3},
]
ROUTED_LEARNS = [LEARNS[0], {"router": 1e-3, "encoders": 1e-3}]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The folder in which one process has trained all stages, by whether the model has a router."""

    @cache
    def trained(routed: bool) -> Path:
        folder, learns = tmp_path_factory.mktemp("alone"), ROUTED_LEARNS if routed else LEARNS
        recipe = _recipe(folder, ["none"] * len(learns), learns, 4, model=ROUTED if routed else {})
        run_recipe(recipe, output=folder / "one")
        return folder

    return trained


def _each(engine: str) -> list[Any]:
    return [
        pytest.param((engine,) * 5, {}, id=engine, marks=pytest.mark.nightly),
        pytest.param((engine,) * 2, ROUTED, id=f"{engine} routed", marks=pytest.mark.nightly),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engines", "model"),
    [
        pytest.param(("zero2", "zero1", PARTITION_ALL, "zero3", OFFLOADED), {}, id="every engine of DeepSpeed"),
        pytest.param((PARTITION_SOON, "none"), ROUTED, id="routed"),
        pytest.param(("fsdp2", "sharded", "fsdp2", "sharded", "sharded"), {}, id="fsdp2 and sharded"),
        pytest.param(("sharded", "fsdp2"), ROUTED, id="sharded and fsdp2 routed"),
        *_each("fsdp2"),
        *_each("sharded"),
    ],
)
def test_two_processes_with_text_only_ranks_equal_one_process_in_every_engine(alone, tmp_path, engines, model):
    """Two samples a rank, split where they are long: ranks have unlike numbers of passes, and many have no picture. Weights must agree
    to 1e-6."""
    first, learns = alone(bool(model)), ROUTED_LEARNS if model else LEARNS
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    one = tmp_path / "one" / "final"
    several = _recipe(tmp_path, engines, learns, 2, model=model)
    several.plugins = [small_is_large(tmp_path)]
    for stage in several.stages:
        stage.max_tokens_per_batch = SPLIT
    several.stages[-1].frozen_encoders = "whole"
    two = run_recipe(several, output=tmp_path / "two", processes=2)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["data"] == b["data"] and a["images"] == b["images"] and a["supervised"] == b["supervised"]
        assert abs(float.fromhex(a["loss"]) - float.fromhex(b["loss"])) < 5e-6 or model
        assert abs(float.fromhex(a["grad_norm"]) - float.fromhex(b["grad_norm"])) < 2e-5 or model
    for stage in [f"stage{i}" for i in range(len(engines))]:
        wanted, found = (load_file(tmp_path / run / stage / "model.safetensors") for run in ("one", "two"))
        assert set(wanted) == set(found) and len(wanted) > 50
        assert max((wanted[name] - found[name]).abs().max().item() for name in wanted) < 1e-6
    models = [MllmForConditionalGeneration.from_pretrained(final).eval() for final in (one, two)]
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (model(input_ids=ids).logits for model in models)
    assert wanted.std() > 0.1 and (wanted - found).abs().max() < 1e-5


def _train_twice(folder):
    parts: dict[str, set[bool]] = {}
    step = ZeroEngine.step

    def looked_at(engine):
        if engine.zero_stage == 3:
            for name, parameter in engine.model.named_parameters():
                parts.setdefault(name.split(".")[1], set()).add(hasattr(parameter, "ds_id"))
        return step(engine)

    ZeroEngine.step = looked_at  # pyright: ignore[reportAttributeAccessIssue]
    for engine in ("zero1", "zero3"):
        learn = {"connector": 1e-3}
        only = {"name": "only", "steps": 2, "batch_size": 1, "engine": engine, "learn": learn}
        run_recipe(make_recipe(folder, stages=[only | {"frozen_encoders": "whole"}]), output=folder / engine)
    assert parts["vision_tower"] == {False} and parts["language_model"] == parts["multi_modal_projector"] == {True}


def test_one_python_process_trains_again_under_zero(tmp_path):
    """A notebook does: DeepSpeed kept the groups of the run before, which were gone. Frozen encoders are asked to stay whole."""
    assert in_a_process(_train_twice, tmp_path) == 0
    assert (tmp_path / "zero3" / "final" / "model.safetensors").is_file()
