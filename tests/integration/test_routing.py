"""Do routed models train: alone and on several processes, on labels, and without collapsing silently?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.errors import ConfigError, DataError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt, routing_inputs
from mllm.processing.processor import MllmProcessor
from mllm.recipe import Recipe
from mllm.routers.build import build_router
from mllm.train import run_recipe
from mllm.train.routing_labels import LabelFile, LabelRule, helpful_experts, labels_path, open_sources, target_weights
from mllm.train.routing_losses import label_source
from mllm.train.routing_monitor import RoutingMonitor
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import TINY_CLIP, tiny_spec, tiny_tokenizer
from tests.integration.train_helpers import LLM

EXPERTS = ["left", "right"]
ENCODERS = {
    "base": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "image_size": 14}},
    "left": {**TINY_CLIP},
    "right": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "image_size": 21}},
}
COLOURS = [(250, 20, 20), (20, 20, 250)]


def write_rows(folder: Path, *, rows: int = 24, text_only_every: int = 0) -> Path:
    """Red and blue pictures; every answer has the same length, so that a mean over pictures is a mean over tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    data = []
    for row in range(rows):
        kind = row % 2
        row_data: dict[str, Any] = {"id": f"row{row}", "kind": ["red", "blue"][kind]}
        image = not (text_only_every and row % text_only_every == 2)
        if image:
            Image.new("RGB", (20 + row % 5, 20), COLOURS[kind]).save(folder / f"{row}.png")
            row_data["image"] = f"{row}.png"
        mark = "<image>\n" if image else ""
        row_data["conversations"] = [{"from": "human", "value": f"{mark}what?"}, {"from": "gpt", "value": "ab"[kind] + str(row % 3)}]
        data.append(row_data)
    path = folder / "rows.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def routed_recipe(folder: Path, stages: list[dict[str, Any]], *, router: dict[str, Any] | None = None, **data: Any) -> Recipe:
    tokenizer, file = folder / "tokenizer", folder / "data" / "rows.json"
    if not tokenizer.is_dir():
        tiny_tokenizer().save_pretrained(str(tokenizer))
    if not file.is_file():
        write_rows(file.parent, **data)
    language_model = {**LLM, "attention_dropout": 0.0}
    spec = tiny_spec(
        str(tokenizer),
        language_model={"config": language_model, "tokenizer": str(tokenizer)},
        encoders=ENCODERS,
        connector={"type": "channel_concat", "grid": [2, 2]},
        router=router or {"type": "gate", "experts": EXPERTS, "hidden": 8},
    )
    defaults = {
        "data": {"format": "llava", "path": str(file)},
        "batch_size": 4,
        "max_length": 400,
        "precision": "fp32",
        "schedule": {"type": "constant", "warmup": 0},
        "learn": {"language_model": 1e-3, "connector": 3e-3, "router": 1e-2, "encoders": 1e-3},
    }
    return Recipe.model_validate(
        {
            "name": "routed",
            "seed": 3,
            "output": str(folder / "run"),
            "model": spec.model_dump(),
            "stages": [{**defaults, **stage} for stage in stages],
        }
    )


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[dict[str, Any]]]:
    """Experts are fixed in the data, one row after the other: with two processes, these see other ones, none, or no picture."""
    folder = tmp_path_factory.mktemp("ranks")
    file = write_rows(folder / "data", rows=16, text_only_every=5)
    rows = json.loads(file.read_text())
    choices: list[Any] = [["left"], ["right"], [], ["left", "right"], ["left"], None, ["right"], []]
    for number, row in enumerate(rows):
        row["experts"] = choices[number % len(choices)]
    file.write_text(json.dumps(rows))
    stage = {
        "name": "sft",
        "steps": 6,
        "batch_size": 1,
        "gradient_accumulation": 2,
        "optimizer": {"eps": 1e-3},  # Adam without it makes a step of 1e-9 gradients, which differ between engines
        "learn": {"language_model": 1e-3, "connector": 3e-3, "router": 1e-2, "encoders.left": 1e-3},
    }
    recipe = routed_recipe(folder, [stage])
    run_recipe(recipe, output=folder / "run1")
    return recipe, records(folder / "run1")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_that_choose_different_experts_or_none_train_like_one_process(
    engine: str, one_process: tuple[Recipe, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Expert left learns, expert right and the base encoder are frozen (and partitioned all the same under ZeRO-3)."""
    recipe, wanted = one_process
    stage = recipe.stages[0].model_copy(update={"engine": engine, "gradient_accumulation": 1})
    run_recipe(recipe.model_copy(update={"stages": [stage]}), processes=2, output=tmp_path / "run2")
    for one, two in zip(wanted, records(tmp_path / "run2"), strict=True):
        assert one["data"] == two["data"], "the processes saw other samples"
        assert (two["loss"], two["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-5)
