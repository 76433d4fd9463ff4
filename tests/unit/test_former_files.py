"""Does what the first version (545f8b5) wrote still open: runs in the middle, finished stages, predictions, codes?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mllm.errors import ConfigError
from mllm.eval.predictions import iterate_predictions
from mllm.eval.run import rescore
from mllm.former_recipes import WITHDRAWN, convert_recipe
from mllm.recipe import StageSpec, load_recipe
from mllm.train.checkpoint.export import finished_otherwise
from mllm.train.checkpoint.resume import _read_progress, difference, signature
from mllm.visual_tokenizers.storage import StoredCodes

FORMER = Path(__file__).parents[1] / "golden/former"


@pytest.fixture
def recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"precision: this key is now dtype.*mllm convert OLD\.yaml NEW\.yaml"):
        load_recipe(str(FORMER / "run.yaml"))
    return load_recipe(str(convert_recipe(FORMER / "run.yaml", tmp_path / "my.yaml")))


def test_a_run_in_the_middle_is_gone_on_with(recipe):
    """Its settings lack those that there are now, whose defaults it was trained with."""
    progress = _read_progress(json.loads((FORMER / "manifest.json").read_text())["progress"])
    rows = json.loads(progress.signature)["rows"]
    (stage,) = (stage for stage in recipe.stages if stage.name == "sft")
    assert progress.step == 6 and difference(progress.signature, signature(recipe, stage, rows)) == ""
    other = stage.model_copy(update={"batch_size": 9})
    assert difference(progress.signature, signature(recipe, other, rows)) == "batch_size: 8 then, 9 now"


def test_a_finished_stage_is_not_trained_again(recipe, tmp_path):
    shutil.copy(FORMER / "recipe.yaml", tmp_path / "recipe.yaml")
    (stage,) = (stage for stage in recipe.stages if stage.name == "pretrain")
    assert finished_otherwise(tmp_path, recipe, stage) == ""
    stage.steps = 3
    assert finished_otherwise(tmp_path, recipe, stage) == "steps: 2 then, 3 now"


def test_a_setting_that_is_withdrawn_matters_only_where_it_was_used(recipe, tmp_path):
    """A stage finished while it was there, at its default, was said to have other settings; so was every setting added since."""
    saved = yaml.safe_load((FORMER / "recipe.yaml").read_text())
    (stage,) = (stage for stage in recipe.stages if stage.name == "pretrain")
    progress = json.loads((FORMER / "manifest.json").read_text())["progress"]
    rows = json.loads(progress["signature"])["rows"]
    (middle,) = (stage for stage in recipe.stages if stage.name == "sft")
    for value, said in ((False, ""), (True, "encoders_beside_update: True then, None now")):
        for each in saved["stages"]:
            each["encoders_beside_update"] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
        assert finished_otherwise(tmp_path, recipe, stage) == said
        with_it = json.dumps({**json.loads(progress["signature"]), "encoders_beside_update": value})
        found = _read_progress({**progress, "signature": with_it})
        assert difference(found.signature, signature(recipe, middle, rows)) == said


def test_no_setting_of_a_stage_disappears_unsaid():
    """Add a new one to the list; one that is taken out of `StageSpec` stays in it and goes into `WITHDRAWN` with its default."""
    known = set((FORMER / "stage_keys.txt").read_text().split())
    assert known == {*StageSpec.model_fields, *WITHDRAWN}


def test_predictions_are_read_and_scored_again(tmp_path):
    for name in ("demo_charts.jsonl", "demo_charts.run.json"):
        shutil.copy(FORMER / name, tmp_path / name)
    before = list(iterate_predictions(tmp_path / "demo_charts.jsonl"))
    result = rescore(tmp_path / "demo_charts.jsonl")
    after = list(iterate_predictions(tmp_path / "demo_charts.jsonl"))
    assert result.task == "demo_charts" and len(before) == len(after) == 12
    assert [row["output"] for row in after] == [row["output"] for row in before]
    assert set(after[0]["scores"]) == {"relaxed_strict v2", "relaxed_pix2struct v1", "exact_match v1"}


def test_codes_are_read():
    codes = StoredCodes(FORMER)
    assert len(codes) == 4 and codes[3].grid == (8, 8)
    assert torch.equal(codes[0].codes["pixel"][0, :2], torch.tensor([[238, 917], [123, 794]]))
