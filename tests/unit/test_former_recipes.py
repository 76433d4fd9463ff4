"""Are recipes and runs of an earlier version opened, or refused with what converts them?"""

from __future__ import annotations

import json

import pytest

from mllm import assets
from mllm.config import parse_yaml, read_yaml, validate
from mllm.errors import ConfigError, UnknownName
from mllm.former_recipes import convert_recipe, upgraded
from mllm.recipe import Recipe, load_recipe

FORMER = """\
# What it is, in a line.
#   mllm train mine
model:
  language_model: {config: {model_type: llama}, tokenizer: t}
stages:
  - name: sft
    learn: {language_model: {rate: 2.0e-3, lora: {r: 4}}}
    data: x
    steps: 3
    precision: bf16
    cache_features: fp16
"""


def test_an_old_key_says_what_it_is_now(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FORMER)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    cure = "`mllm convert OLD.yaml NEW.yaml` rewrites a whole file"
    words = "Input should be 'auto', 'float32', 'bfloat16', 'float16' or 'int8'"
    assert [line.partition(".yaml.")[2] for line in str(error.value).splitlines()] == [
        f"stages.sft.learn.language_model.rate: this key is now lr; {cure}",
        f"stages.sft.cache_features: {words} (got 'fp16', which is now float16)",
        f"stages.sft.precision: this key is now dtype (float32 or bfloat16); {cure}",
    ]
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.dtype.*'float32' or 'bfloat16'"):
        load_recipe("demo", ["stages.0.dtype=bf16"])


def test_of_a_key_with_several_forms_the_one_that_was_written_is_explained():
    def said(learn: object) -> list[str]:
        stage = {"name": "sft", "learn": learn, "data": "x", "steps": 3}
        with pytest.raises(ConfigError) as error:
            validate(Recipe, {"name": "x", "model": {"language_model": {"source": "s"}}, "stages": [stage]})
        return str(error.value).splitlines()

    assert said({"connector": {"weight_decay": 0.1}}) == ["stages.sft.learn.connector.lr: this key is required"]
    (line,) = said({"Connector": {"lr": 1e-3, "lora": {"r": "x"}}})  # a name that looks like a form's
    assert line.startswith("stages.sft.learn.Connector.lora.r: ")
    (line,) = said({"connector": "fast"})
    assert line.startswith("stages.sft.learn.connector: ") and "fast" in line


def test_a_converted_recipe_loads_and_keeps_its_head(tmp_path):
    path, new = tmp_path / "mine.yaml", tmp_path / "new.yaml"
    path.write_text(FORMER)
    convert_recipe(path, new)
    assert new.read_text().startswith("# What it is, in a line.\n#   mllm train mine\nmodel:")
    stage = load_recipe(str(new)).stages[0]
    assert stage.dtype == "bfloat16" and stage.cache_features == "float16"
    assert stage.learning()["language_model"].lr == 2e-3
    with pytest.raises(ConfigError, match="already"):
        convert_recipe(new, tmp_path / "again.yaml")
    with pytest.raises(ConfigError, match="exists"):
        convert_recipe(path, new)


def test_a_recipe_that_is_only_read_may_be_old_and_todays_are_left_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + FORMER)
    assert load_recipe(str(path), trusted=False).stages[0].dtype == "bfloat16"
    plain = read_yaml("recipes/demo.yaml")
    assert upgraded(plain) == plain
    assert validate(Recipe, upgraded({"name": "x", **parse_yaml(FORMER)})).stages[0].steps == 3


def test_a_checkpoint_of_an_earlier_version_is_compared_in_todays_words():
    from mllm.train.checkpoint.resume import _read_progress, difference

    former = {"name": "sft", "precision": "fp32", "learn": {"connector": {"rate": 0.1, "lora": None}}, "rows": {}}
    now = {"name": "sft", "dtype": "float32", "learn": {"connector": {"lr": 0.1, "lora": None}}, "rows": {}}
    saved = _read_progress({"stage": "sft", "step": 3, "precision": "fp32", "signature": json.dumps(former)})
    assert saved.dtype == "float32" and difference(saved.signature, json.dumps(now, sort_keys=True)) == ""
    assert "lr: 0.1 then" in difference(saved.signature, json.dumps(now).replace("0.1", "0.2"))


def test_a_checkpoint_folder_means_the_recipe_that_it_keeps(tmp_path):
    (tmp_path / "recipe.yaml").write_text(assets.find("recipes", "demo", kind="recipe").read_text())
    assert load_recipe(str(tmp_path)).stages == load_recipe("demo").stages
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UnknownName, match="unknown recipe"):
        load_recipe(str(tmp_path))
