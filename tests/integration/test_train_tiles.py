"""Do plan, inspect and packed training count a picture's tiles as the model does?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train import run_recipe
from mllm.train.preflight.inspection import inspect_recipe
from mllm.train.preflight.inspection_page import write_page
from mllm.train.preflight.plan import plan_recipe
from mllm.train.preflight.plan_report import plan_tables
from tests.helpers import picture
from tests.integration.test_train_engines import PARTITION_ALL
from tests.integration.train_helpers import make_recipe
from tests.unit.models.test_native import KINDS

SIZES = [(28, 28), (90, 30), (20, 70), (61, 59), (300, 5)]


def write_rows(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for row in range(15):
        names = [f"{row}-{k}.png" for k in range((row + 2) % 3)]
        for number, name in enumerate(names):
            picture(row * 7 + number, size=SIZES[(row + number) % len(SIZES)]).save(folder / name)
        question, answer = "<image>\n" * len(names) + "what is it?", f"it is {row}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"r{row}", "conversations": turns, **({"image": names} if names else {})})
    (folder / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")


def _cells_of(shown):
    """Everything that the tables of a plan say."""
    return [
        str(cell) for table in shown if hasattr(table, "columns") for column in table.columns for cell in column._cells
    ]


@pytest.mark.slow
def test_two_processes_with_other_numbers_of_tiles_on_each_equal_one(tmp_path):
    """One sample a rank and batch: no picture, or one or two of other grids than the other rank's, and text alone."""
    write_rows(tmp_path / "data")
    views = {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]], "thumbnail_only": ["detail"]}
    calm = {"steps": 2, "gradient_accumulation": 2, "optimizer": {"eps": 1e-5}, "max_length": 420}
    learns = {"language_model": 1e-3, "connector": 3e-3, "encoders": 1e-3}
    runs = {}
    for name, processes in (("one", 1), ("two", 2)):
        engines = [e if processes == 2 else "none" for e in ("zero2", PARTITION_ALL)]
        stages = [
            {"name": f"stage{k}", "engine": engine, "learn": learns, "batch_size": 2 // processes, **calm}
            for k, engine in enumerate(engines)
        ]
        recipe = make_recipe(tmp_path, stages=stages, model={"views": views})
        recipe.model.language_model.config["attention_dropout"] = 0.0
        run_recipe(recipe, output=tmp_path / name, processes=processes)
        runs[name] = [load_file(tmp_path / name / f"stage{k}" / "model.safetensors") for k in range(2)]
    for wanted, found in zip(runs["one"], runs["two"], strict=True):
        assert set(wanted) == set(found) and "model.multi_modal_projector.newline" in wanted
        assert max((wanted[name] - found[name]).abs().max().item() for name in wanted) < 2e-6


def test_a_packed_run_in_tiles_is_planned_shown_and_trained(tmp_path):
    write_rows(tmp_path / "data")
    views = {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]]}
    stage = {"name": "sft", "steps": 3, "packing": True, "max_length": 420, "batch_size": 1}
    recipe = make_recipe(tmp_path, stages=[stage], model={"views": views})

    planned = plan_recipe(recipe)
    assert any(
        "up to 88 visual tokens" in line for line in planned.joins
    )  # 16 of the thumbnail, 8 × (8 + 1) of four tiles
    (stage_plan,) = planned.stages
    assert len(stage_plan.image_tokens) == 15 and len(set(stage_plan.image_tokens)) > 2
    assert any("tokens of a picture (15 looked at)" in cell for cell in _cells_of(plan_tables(planned)))
    (seen,) = inspect_recipe(recipe, num_samples=6)
    shown = [sample for row in seen.rows for sample in row.samples]
    for sample in shown:
        images = [run for run in sample.runs if run.kind == "image"]
        assert all(run.stop - run.start == run.layout.num_tokens for run in images)
        assert len(sample.pictures) == sum(run.layout.num_views for run in images)
        assert {p.start for p in sample.pictures} == {run.start for run in images}
    assert len({run.stop - run.start for sample in shown for run in sample.runs if run.kind == "image"}) > 1
    page = write_page([seen], tmp_path / "page.html", title="tiles").read_text(encoding="utf-8")
    assert "view 4 as" in page or "view 2 as" in page
    assert 'class="tile"' in page, "the thumbnail shows where the tiles are"

    run_recipe(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
    (checkpoint,) = [
        p
        for p in (tmp_path / "run").rglob("config.json")
        if (p.parent / "preprocessor_config.json").is_file() or (p.parent / "processor_config.json").is_file()
    ][:1]
    trained = MllmForConditionalGeneration.from_pretrained(checkpoint.parent)
    newline = trained.model.multi_modal_projector.newline
    assert newline is not None and trained.config.views["type"] == "tiles"


def test_native_pictures_and_thumbnails_are_planned_shown_and_trained(tmp_path):
    write_rows(tmp_path / "data")
    stage = {"name": "sft", "steps": 1, "max_length": 420, "batch_size": 6}
    native = {**KINDS["siglip2"], "encoders": {"semantic": KINDS["siglip2"]["encoders"]["semantic"]}}
    recipe = make_recipe(tmp_path, stages=[stage], model=native)
    (stage_plan,) = plan_recipe(recipe).stages
    assert len(stage_plan.image_tokens) == 15 and stage_plan.memory["activations and loss"] > 0
    (seen,) = inspect_recipe(recipe, num_samples=6)
    pictures = [picture for row in seen.rows for sample in row.samples for picture in sample.pictures]
    for shown in pictures:
        rows, columns = shown.layout.patches
        assert shown.pixels["semantic"].size == (columns * 8, rows * 8)
    page = write_page([seen], tmp_path / "native.html", title="native").read_text(encoding="utf-8")
    rows, columns = pictures[0].layout.patches
    assert (
        f"{rows * 8} × {columns * 8} pixels → {rows} × {columns} patches; lines: {rows // 2} × {columns // 2}" in page
    )
    assert page.count("no token: padding") == 0
    run_recipe(recipe)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line["loss"])

    views = {"type": "tiles", "grids": [[1, 2], [2, 2]], "thumbnail_only": ["detail"]}
    (seen,) = inspect_recipe(make_recipe(tmp_path, stages=[stage], model={"views": views}), num_samples=6)
    pictures = [picture for row in seen.rows for sample in row.samples for picture in sample.pictures]
    assert pictures and all(("detail" in p.pixels) == (p.view == 0) and "semantic" in p.pixels for p in pictures)
