"""Do wrong answers become pairs to prefer by, and is what is no pair, or no training data, told apart?"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.data.mixture import load_mixture
from mllm.data.sources import open_source
from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import load_data
from mllm.eval.studies.pairs import write_pairs, write_questions
from mllm.eval.task import load_task
from mllm.recipe import load_recipe
from mllm.train.stages.preference.stage import check_preference
from tests.helpers import picture


def _answer(name, output, value, kind="value", **more):
    scores = {"relaxed_strict": {"value": value}, "exact_match": {"value": 0.0}}
    return {"id": name, "question": f"What is {name}?", "output": output, "category": kind, "scores": scores, **more}


@pytest.fixture
def asked(tmp_path):
    """(an evaluation's answers, the rows that it asked)."""
    folder = tmp_path / "charts_pairs"
    folder.mkdir()
    picture().save(folder / "a.png")
    kinds = {"a": "value", "b": "value", "c": "colour", "d": "value", "e": "value", "f": "difference"}
    rows = [
        {"id": name, "image": "a.png", "question": f"What is {name}?", "answer": "12", "kind": kind}
        for name, kind in kinds.items()
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        _answer("a", "12", 1.0), _answer("b", " 47 ", 0.0), _answer("c", "red", 0.0), _answer("d", "  ", 0.0),
        _answer("e", "", None), _answer("f", "3", 0.0),
    ]  # fmt: skip
    (tmp_path / "real_charts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path / "real_charts.jsonl", folder / "test.jsonl"


def test_wrong_answers_become_pairs_that_the_recipe_reads(asked):
    predictions, rows = asked
    made = write_pairs(predictions, rows, rows.parent / "pairs.jsonl")
    assert made.kinds == {"value": 1, "colour": 1, "difference": 1} and made.rows == 3
    assert made.skipped == {"right, or nearly": 1, "without words": 1, "without a score": 1}
    stage = load_recipe("real_charts_dpo").stages[-1]
    options = check_preference(stage)
    (item,) = load_mixture(stage.data).datasets
    dataset: Any = item.dataset
    source = open_source(dataset.model_copy(update={"path": str(made.path)}))
    sample = source[0]
    assert len(source) == 3 and len(sample.images) == 1
    assert (sample.turns[-1].content, sample.meta[options.rejected]) == ("12", "47")


def test_the_recipe_is_real_charts_and_one_stage_more():
    plain, longer = load_recipe("real_charts"), load_recipe("real_charts_dpo")
    assert longer.model == plain.model and longer.stages[:-1] == plain.stages


def test_only_kinds_that_are_wanted_and_were_asked(asked):
    result = CliRunner().invoke(app, ["data", "build", "pairs", *map(str, asked), "--kinds", "value,difference"])
    assert result.exit_code == 0, result.output
    assert "3 left out: of another kind" not in result.output and "1 left out: of another kind" in result.output
    assert "2 rows (1 value, 1 difference)" in result.output
    with pytest.raises(ConfigError, match=r"kind of question 'price'.*colour, difference, value"):
        write_pairs(asked[0], asked[1], asked[1].parent / "pairs.jsonl", kinds=["price"])


def test_what_does_not_belong_together_is_refused(asked, tmp_path, monkeypatch):
    predictions, rows = asked
    with pytest.raises(ConfigError, match="pictures are found from"):
        write_pairs(predictions, rows, tmp_path / "pairs.jsonl")
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text().replace("What is b?", "What else is b?"))
    with pytest.raises(DataError, match="does not ask so"):
        write_pairs(predictions, other, rows.parent / "pairs.jsonl")
    right = tmp_path / "right.jsonl"
    right.write_text(json.dumps(_answer("a", "12", 1.0)) + "\n")
    with pytest.raises(DataError, match="no wrong answer"):
        write_pairs(right, rows, rows.parent / "pairs.jsonl")
    other.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="no row with id, image, question and answer"):
        write_pairs(predictions, other, rows.parent / "pairs.jsonl")
    assert not (rows.parent / "pairs.jsonl").exists()


def test_the_benchmarks_own_questions_are_no_training_data(asked, tmp_path, monkeypatch):
    predictions, rows = asked
    monkeypatch.chdir(tmp_path)
    shutil.copytree(rows.parent, "runs/charts_test")
    own = tmp_path / "runs" / "charts_test" / "test.jsonl"
    with pytest.raises(ConfigError, match="what benchmark real_charts asks"):
        write_pairs(predictions, own, own.with_name("pairs.jsonl"))


def _charts(folder):
    """Two training charts, the second with two questions."""
    folder.mkdir()
    (folder / "train").mkdir()
    picture().save(folder / "train" / "0.png")
    seen = {"type": "image", "image": "train/0.png"}

    def row(number, kinds):
        turns: list[dict[str, Any]] = []
        for kind in kinds:
            question = f"What {kind} is {number}?"
            content = question if turns else [seen, {"type": "text", "text": f"\n{question}"}]
            turns += [{"role": "user", "content": content}, {"role": "assistant", "content": str(number)}]
        return {
            "id": f"train-{number}",
            "messages": turns,
            "kinds": kinds,
            "table": f"t/{number}",
            "chart": "bar",
            "renderer": "matplotlib",
        }

    (folder / "train.jsonl").write_text(
        "".join(json.dumps(row(n, k)) + "\n" for n, k in enumerate([["colour"], ["value", "colour"]]))
    )
    return folder / "train.jsonl"


def test_training_charts_ask_as_the_benchmark_does(tmp_path):
    charts, output = _charts(tmp_path / "charts"), tmp_path / "charts_pairs"
    result = CliRunner().invoke(
        app, ["data", "build", "questions", str(charts), "--output", str(output), "--kinds", "value"]
    )
    assert result.exit_code == 0 and "1 rows (1 value)" in result.output, result.output
    assert write_questions(charts, output).kinds == {"colour": 2, "value": 1}
    rows = {row["id"]: row for row in map(json.loads, (output / "test.jsonl").read_text().splitlines())}
    assert rows["train-1-1"]["question"] == "What colour is 1?" and rows["train-1-1"]["answer"] == "1"
    assert rows["train-0-0"]["question"] == "What colour is 0?", "without the line break behind the picture"
    (tmp_path / "real_charts.jsonl").write_text(
        json.dumps(_answer("train-1-0", "7", 0.0, question=rows["train-1-0"]["question"])) + "\n"
    )
    assert write_pairs(tmp_path / "real_charts.jsonl", output / "test.jsonl", output / "pairs.jsonl").rows == 1
    data = load_data(load_task("real_charts"), data={"real_charts": output})
    assert {item.id for item in data.items} == set(rows)
    assert all(item.pictures[0].load()[0].size == picture().size for item in data.items), "found through the link"


def test_questions_of_charts_are_refused_where_they_would_mix(tmp_path):
    charts, output = _charts(tmp_path / "charts"), tmp_path / "charts_pairs"
    with pytest.raises(ConfigError, match="holds the charts themselves"):
        write_questions(charts, charts.parent)
    with pytest.raises(ConfigError, match=r"'price'.*colour, value"):
        write_questions(charts, output, kinds=["price"])
    write_questions(charts, output, limit=1)
    with pytest.raises(ConfigError, match="holds other pictures"):
        write_questions(_charts(tmp_path / "others"), output)
    charts.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="expected rows with id, messages, kinds and table"):
        write_questions(charts, output)
