"""Does `mllm new` write a recipe that loads, or say what is wrong and write nothing?"""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import MllmError
from mllm.recipe import load_recipe


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {
        "image": "a.png",
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return ["--data", "rows.jsonl", "--yes", "--no-plan", "--gpus", "0"]


def test_a_name_with_its_suffix_writes_the_file_of_that_name(rows, tmp_path):
    assert CliRunner().invoke(app, ["new", "two words.yaml", *rows]).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["two words.yaml", "two words_data.yaml"]
    assert load_recipe("two words.yaml").model.encoders


def test_what_is_typed_next_can_be_typed(rows):
    assert "mllm train 'two words.yaml'" in CliRunner().invoke(app, ["new", "two words", *rows]).output


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["", "-e", "siglip2-so400m-384"], "no name for a recipe"),
        (["nowhere/my"], "no folder nowhere"),
        (["my", "-e", ","], "--encoder ',' names none"),
        (["my", "-e", "dinov2-l", "-e", "dinov2-l"], "given 2 times"),
        (["my", "--language-model", " "], "--language-model is empty"),
        (["my", "--gpus", "1", "--memory", "-3"], "--memory -3"),
        (["my", "--gpus", "1", "--memory", "nan"], "--memory nan"),
        (["my", "--tasks", "no_such_task"], "no_such_task"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_said_and_nothing_is_written(rows, tmp_path, given, told):
    result = CliRunner().invoke(app, ["new", given[0], *rows, *given[1:]])
    assert isinstance(result.exception, MllmError) and told in str(result.exception), result.output
    assert not list(tmp_path.glob("**/*.yaml"))
