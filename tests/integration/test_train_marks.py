"""Does a recipe with a segmentation head train, resume to the bit, and give a checkpoint that marks?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mllm.demo.scenes import prepare_scenes, train_text_tokenizer
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.mask_files import decode_rle
from mllm.recipe import Recipe, load_recipe
from mllm.train.preflight.inspection import inspect_recipe
from mllm.train.preflight.inspection_page import write_page
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
    whole = load_recipe("segmentation_demo", [f"{key}={value}" for key, value in changes.items()])
    whole.stages = whole.stages[:1]
    return whole


PARTITION_ALL = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
PATCHES = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
ASKED = ("<image>\nPlease segment it.", "<image> [EX]\n<image>\nPlease segment the same.")


def test_what_is_inspected_has_the_masks_that_are_learned_and_shown(tmp_path: Path) -> None:
    prepare_scenes(tmp_path / "data", train=12, test=2)
    train_text_tokenizer(tmp_path / "text")
    scenes = tmp_path / "data/train.jsonl"
    row = json.loads(scenes.read_text().splitlines()[0])
    picture, mask = row["images"][0], next(mask for mask in row["masks"] if mask is not None)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "It is [SEG]."}] for text in ASKED]
    asked = {"id": "asked", "images": [picture], "messages": turns[0], "masks": [mask]}
    shown = {"id": "shown", "images": [picture] * 2, "messages": turns[1], "masks": [mask, None]}
    scenes.write_text("".join(json.dumps(r) + "\n" for r in (asked, shown)))
    changed = recipe(tmp_path)
    changed.model.heads["marks"]["examples"] = {"queries": 2, "heads": 2, "mlp_width": 8}
    (seen,) = inspect_recipe(changed, num_samples=2)
    samples = {sample.id: sample for line in seen.rows for sample in line.samples}
    share = float(decode_rle(mask).mean())
    (own,) = samples["asked"].masks
    assert own.learned and own.number == 0 and own.share == pytest.approx(share)
    example, nothing = samples["shown"].masks
    assert (example.learned, example.number, example.share) == (False, 0, pytest.approx(share))
    assert (nothing.learned, nothing.number, nothing.share) == (True, 1, 0)
    plain, red = (np.asarray(p) for p in (samples["shown"].pictures[0].pixels["eye"], example.seen))
    assert ((plain != red).any(-1) == decode_rle(mask)).all()
    page = write_page([seen], tmp_path / "page.html", title="x").read_text()
    assert page.count("is learned</fig") == 2 and "is shown by the question" in page and "marks nothing" in page


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


def test_two_processes_of_which_one_has_no_masks_equal_one_process_in_every_engine(tmp_path: Path) -> None:
    """A rank without masks makes its gradients in another order than the others, and none of what only its neighbour runs; weights must
    agree to 1e-5."""
    prepare_scenes(tmp_path / "data", train=16, test=2)
    train_text_tokenizer(tmp_path / "text")
    scenes = tmp_path / "data/train.jsonl"
    marked = [json.loads(line) for line in scenes.read_text().splitlines()]
    asked = {"role": "user", "content": "<image>\nWhich one?"}
    verdict, none = ({"role": "assistant", "content": text} for text in ("It is the red circle.", "None."))
    rows = [
        row
        if n % 4 == 0
        else {"id": f"w{n}", "images": row["images"], "messages": [asked, verdict if n % 8 == 1 else none]}
        for n, row in enumerate(marked)
    ]
    scenes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, told = [], []
    for processes in (1, 2):
        changed = recipe(tmp_path)
        changed.model.encoders["eye"] = {
            "type": "hf",
            "image_size": 64,
            "layers": [-1],
            "architecture": PATCHES,
        }  # no batch norm
        changed.model.heads["marks"]["norm"] = "none"
        changed.model.heads["sure"] = {"type": "probability", "phrase": "It is the red", "words": ["circle", "square"]}
        (stage,) = changed.stages
        stage.batch_size, stage.steps, stage.optimizer.eps = 4 // processes, 3, 1e-5
        engines = ("zero2", PARTITION_ALL, "none") if processes == 2 else ("none",) * 3
        changed.stages = [stage.model_copy(update={"name": f"s{n}", "engine": e}) for n, e in enumerate(engines)]
        final = run_recipe(changed, output=tmp_path / str(processes), processes=processes)
        found.append(load_file(str(final / "model.safetensors")))
        lines = (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("head_loss", {}) for line in lines]
        told.append([one.get("marks/bce") for one in losses])
        assert any("sure/class" in one for one in losses) and not all("sure/class" in one for one in losses)
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], atol=1e-5, rtol=0), key
    assert told[0] == pytest.approx(told[1], abs=1e-5) and None in told[0] and any(told[0])
