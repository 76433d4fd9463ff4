"""Does a run that learns from shards, stopped and resumed, become what the run that was not stopped becomes?"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mllm.errors import ConfigError
from mllm.recipe import Recipe
from mllm.train import run_recipe
from mllm.train.preflight.stage_settings import check_stage
from tests.integration.train_helpers import make_recipe, metrics


def _recipe(folder: Path, **stage: Any) -> Recipe:
    """Over four tar shards with the rows and pictures that `make_recipe` writes."""
    settings = {"name": "sft", "steps": 4, "batch_size": 2, "num_workers": 1, **stage}
    recipe, folder = make_recipe(folder, stages=[settings]), folder / "data"
    data = {"name": "s", "format": "llava", "path": f"{folder}/s-{{0..3}}.tar", "rows": 24, "shuffle_buffer": 6}
    rows = json.loads((folder / "mixed.json").read_text())
    for shard in range(4):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as file:
            for row in rows[shard::4]:
                names = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
                parts = {f"{k}.png": (folder / name).read_bytes() for k, name in enumerate(names)}
                for kind, content in (parts | {"json": json.dumps(row).encode()}).items():
                    info = tarfile.TarInfo(f"{row['id']}.{kind}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"data": data})]})


@pytest.mark.parametrize(
    "processes, packing", [(1, False), (1, True), pytest.param(2, True, marks=pytest.mark.nightly)]
)
def test_a_stopped_run_learns_the_same_rows_and_ends_with_the_same_weights(tmp_path, processes, packing):
    recipe = _recipe(tmp_path, packing=packing, max_length=200)
    whole = run_recipe(recipe, output=tmp_path / "whole", processes=processes)
    run_recipe(recipe, output=tmp_path / "again", processes=processes, stop_after=2)
    again = run_recipe(recipe, output=tmp_path / "again", processes=processes, resume=True)
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all((wanted[name] == found[name]).all() for name in wanted)


def test_what_needs_every_row_beforehand_is_refused(tmp_path):
    for settings, reason in (
        ({"group_by_length": True}, "group_by_length: s lies in shards"),
        ({"packing": True, "steps": None, "epochs": 1}, "the schedule needs a length; give steps"),
        ({"cache_features": True}, "features are stored by row"),
    ):
        recipe = _recipe(tmp_path, **settings)
        with pytest.raises(ConfigError, match=reason):
            check_stage(recipe.stages[0], recipe)
