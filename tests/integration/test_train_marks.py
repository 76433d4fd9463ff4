"""Does a recipe with a segmentation head train, resume to the bit, and give a checkpoint that marks?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mllm.demo.scenes import prepare_scenes, train_text_tokenizer
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import Recipe, load_recipe
from mllm.train.run import run_recipe


def recipe(root: Path) -> Recipe:
    dataset = {"name": "scenes", "format": "messages", "path": str(root / "data/train.jsonl"), "licence": "Apache-2.0"}
    changes = {
        "model.language_model.tokenizer": str(root / "text"),
        "model.language_model.config.hidden_size": 32,
        "model.language_model.config.intermediate_size": 48,
        "model.language_model.config.num_hidden_layers": 1,
        "model.encoders.eye.options.layers": [1, 1, 1, 1],
        "stages.sft.data": json.dumps({"datasets": [{"dataset": dataset}]}),
        "stages.sft.batch_size": 4,
        "stages.sft.steps": 4,
        "stages.sft.log_every": 1,
    }
    return load_recipe("segmentation_demo", [f"{key}={value}" for key, value in changes.items()])


def test_a_segmentation_stage_resumes_exactly_and_its_checkpoint_marks(tmp_path: Path) -> None:
    data = prepare_scenes(tmp_path / "data", train=16, test=2)
    train_text_tokenizer(tmp_path / "text")
    whole = run_recipe(recipe(tmp_path), output=tmp_path / "whole")
    run_recipe(recipe(tmp_path), output=tmp_path / "parts", stop_after=2)
    parts = run_recipe(recipe(tmp_path), output=tmp_path / "parts", resume=True)
    first, second = (load_file(str(folder / "model.safetensors")) for folder in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert any(name.startswith("heads.marks.decoder") for name in first)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(set(record.get("head_loss", {})) == {"marks/bce", "marks/dice"} for record in records)
    model = MllmForConditionalGeneration.from_pretrained(whole).eval()
    test = json.loads((data / "marks_test.jsonl").read_text().splitlines()[0])
    found = model.segment(str(data / test["image"]), test["phrase"], max_new_tokens=4)
    assert tuple(found.masks.shape[1:]) == (64, 64)
