"""Does the demo read what it has drawn, wherever that is?"""

from __future__ import annotations

from pathlib import Path

from mllm.data.lookup import load_mixture
from mllm.demo.charts_and_digits import DATA, read_from
from mllm.recipe import load_recipe


def paths(stage):
    return [str(item.dataset.path) for item in load_mixture(stage.data).datasets]


def test_every_stage_reads_the_demos_data_from_the_folder_that_was_asked_for(tmp_path: Path):
    recipe = load_recipe("demo", [])
    assert read_from(recipe, DATA) is recipe
    moved = read_from(recipe, tmp_path / "data")
    for before, after in zip(recipe.stages, moved.stages):
        wanted = [path.replace("runs/demo/data", str(tmp_path / "data")) for path in paths(before)]
        assert paths(after) == wanted != paths(before)
        left = [[(item.repeat, item.dataset.name) for item in load_mixture(s.data).datasets] for s in (before, after)]
        assert left[0] == left[1]
    own = load_recipe("demo", ['stages.sft.data={"format": "llava", "path": "mine.json"}'])
    assert read_from(own, tmp_path / "data").stages[1] == own.stages[1]
