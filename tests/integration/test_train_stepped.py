"""Does packing with ``samples_per_step`` train what padded batches of so many samples train?"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from mllm.data.mixture import Mixture
from mllm.data.plan import Position, SteppedPlan, make_plan
from mllm.errors import ConfigError
from mllm.train import run_recipe
from tests.integration.train_helpers import make_recipe, metrics

CALM = {"optimizer": {"eps": 1e-5}, "epochs": 1, "max_length": 200, "attention": None}


def _recipe(folder, **stage):
    recipe = make_recipe(folder, stages=[{"name": "sft", **CALM, **stage}], rows=20)
    recipe.model.language_model.config["attention_dropout"] = 0.0
    return recipe


def test_each_packed_step_learns_from_the_samples_of_a_padded_one(tmp_path):
    run_recipe(_recipe(tmp_path, batch_size=8), output=tmp_path / "padded")
    stepped = _recipe(tmp_path, batch_size=2, packing=True, samples_per_step=8)
    packed = run_recipe(stepped, output=tmp_path / "packed")
    a, b = metrics(tmp_path / "padded"), metrics(tmp_path / "packed")
    assert len(a) == len(b) == 3
    assert [record["samples"] for record in b] == [8, 16, 20]  # 24 where the padded run fills its last step up
    for one, two in zip(a[:2], b[:2], strict=True):
        assert one["data"] == two["data"] and one["supervised"] == two["supervised"]
        assert abs(float.fromhex(one["loss"]) - float.fromhex(two["loss"])) < 1e-5
    run_recipe(stepped, output=tmp_path / "again", stop_after=1)
    run_recipe(stepped, output=tmp_path / "again", resume=True)
    assert metrics(tmp_path / "again") == b
    wanted, found = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "again" / "final"))
    assert all((wanted[name] == found[name]).all() for name in wanted)
    with pytest.raises(ConfigError, match="set packing: true"):
        run_recipe(_recipe(tmp_path, samples_per_step=8), output=tmp_path / "refused")


def test_processes_share_a_steps_samples_and_each_is_seen_once(tmp_path):
    recipe = _recipe(tmp_path)
    mixture = Mixture(recipe.stages[0].data, seed=1)
    lengths = [np.random.default_rng(0).integers(20, 90, 20)]
    settings = {"batch_size": 2, "packing": True, "lengths": lengths, "max_length": 100, "total": 40}
    plan = make_plan(mixture, world_size=2, samples_per_step=8, **settings)
    assert isinstance(plan, SteppedPlan) and plan.num_steps() == 5
    for window in range(5):
        seen, counts = [], []
        for rank in range(2):
            mine = [b for b in plan.batches(rank, Position(window, 0)) if b.position.window == window]
            counts.append(len(mine))
            assert all(sum(lengths[0][draw.row] for draw in row) <= 100 for batch in mine for row in batch.rows)
            seen += [draw.number for batch in mine for row in batch.rows for draw in row]
        assert sorted(seen) == list(range(8 * window, 8 * window + 8)) and counts[0] == counts[1]
    with pytest.raises(ConfigError, match="samples_per_step is 10, which the 4 rows"):
        make_plan(mixture, world_size=2, samples_per_step=10, **settings)
