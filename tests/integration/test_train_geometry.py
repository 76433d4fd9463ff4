"""Does a recipe with heads of geometry train, with a rate of their own and a loss for each part, and resume to the bit?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mllm.demo.clips import prepare_clips, train_clips_tokenizer
from mllm.recipe import Recipe, load_recipe
from mllm.train.run import run_recipe


def recipe(root: Path) -> Recipe:
    heads = {"pose": {"type": "pose", "depth": 1, "num_heads": 2}, "far": {"type": "depth_map", "scale": "free"}}
    changes = {
        "model.language_model.tokenizer": str(root / "text"),
        "model.heads": json.dumps(heads),
        "stages.sft.data.path": str(root / "data/taught.jsonl"),
        "stages.sft.learn.heads": "5.0e-3",
        "stages.sft.batch_size": 3,
        "stages.sft.packing": "true",
        "stages.sft.steps": 4,
        "stages.sft.log_every": 1,
    }
    return load_recipe("video_demo", [f"{key}={value}" for key, value in changes.items()])


def test_heads_of_geometry_train_beside_the_words_and_resume_exactly(tmp_path: Path) -> None:
    data = prepare_clips(tmp_path / "data", num_train=24, num_test=2)
    train_clips_tokenizer(tmp_path / "text")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    step = np.eye(4)
    step[0, 3] = 0.25
    path = np.stack([np.linalg.matrix_power(step, k) for k in range(6)])
    for row in rows[::2]:  # the others tell nothing
        row |= {"poses": [{"matrices": path.tolist()}], "depths": [{"path": "far.npy"}]}
    np.save(data / "far.npy", np.linspace(1, 4, 6 * 64, dtype=np.float32).reshape(6, 8, 8))
    (data / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = run_recipe(recipe(tmp_path), output=tmp_path / "whole")
    run_recipe(recipe(tmp_path), output=tmp_path / "parts", stop_after=2)
    parts = run_recipe(recipe(tmp_path), output=tmp_path / "parts", resume=True)
    first, second = (load_file(str(folder / "model.safetensors")) for folder in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    told = {"pose/translation", "pose/rotation", "pose/degrees", "pose/turned", "far/log", "far/gradient"}
    assert all(set(record["head_loss"]) == told for record in records), "fov is in no row"
    rates = records[0]["lr"]
    ratio = {name: rate / rates["language_model"] for name, rate in rates.items()}
    own = {name for name, value in ratio.items() if abs(value - 2.5) < 1e-6}
    assert own == {"heads.far", "heads.far/no_decay", "heads.pose", "heads.pose/no_decay"}, rates
