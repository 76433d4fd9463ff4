"""Do plan, inspect and packed training count a picture's tiles as the model does?"""

from __future__ import annotations

import json
import math
from pathlib import Path

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train import run_recipe
from mllm.train.preflight.inspection import inspect_recipe
from mllm.train.preflight.inspection_page import write_page
from mllm.train.preflight.plan import plan_recipe
from tests.helpers import picture
from tests.integration.train_helpers import make_recipe

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


def test_a_packed_run_in_tiles_is_planned_shown_and_trained(tmp_path):
    write_rows(tmp_path / "data")
    views = {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]]}
    stage = {"name": "sft", "steps": 3, "packing": True, "max_length": 420, "batch_size": 1}
    recipe = make_recipe(tmp_path, stages=[stage], model={"views": views})

    planned = plan_recipe(recipe)
    assert any(
        "up to 88 visual tokens" in line for line in planned.joins
    )  # 16 of the thumbnail, 8 × (8 + 1) of four tiles
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
