"""Do many runs stand beside each other as worked out by hand, and do scores leave in forms that others read?"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import yaml

from mllm.errors import ConfigError, DataError
from mllm.eval.planning import plan_rows, plan_tasks
from mllm.eval.report.exports import export_results, latex_table, read_results
from mllm.eval.report.show import write_report
from mllm.eval.run import evaluate, rescore
from mllm.eval.studies.leaderboard import leaderboard, named_runs
from mllm.eval.task import load_task, load_tasks
from mllm.models.card import model_card
from tests.unit.eval.rules import RuleGenerator, constant
from tests.unit.eval.test_official_files import picture, write
from tests.unit.eval.test_watch_and_mine import mmvp


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Eight questions: strong has seven right, weak four, none three of weak's."""
    place = tmp_path_factory.mktemp("runs")
    rows = [{"imgname": "1.png", "query": f"q{k}?", "label": str(10 + k)} for k in range(8)]
    write(place / "d/test/test_human.json", rows[:4])
    write(place / "d/test/test_augmented.json", rows[4:])
    picture(place / "d/test/png/1.png")
    right = {"strong": set(range(7)), "weak": {0, 1, 4, 5}, "third": {0, 1, 4}}
    for name, known in right.items():

        def rule(request, known=known):
            k = int(request.turns[-1].content.split("?")[0][-1])
            return str(10 + k) if k in known else "nothing"

        results = evaluate(
            RuleGenerator(rule, name), ["chartqa"], place / name / "eval", data={"chartqa": place / "d"}, progress=False
        )
        write_report(results, place / name / "eval", show=False)
    return {name: place / name / "eval" for name in right}


def table(study, caption: str):
    return next(found for found in study.tables if found.caption.startswith(caption))


def test_runs_are_ranked_compared_and_split_by_difficulty(runs, tmp_path):
    study = leaderboard(named_runs([str(place) for place in runs.values()]), tmp_path)
    assert [row[0] for row in table(study, "Runs").rows] == ["strong", "weak", "third"]
    pairs = {row[1:3]: row for row in table(study, "Every two").rows}
    assert pairs["strong", "weak"][3] == "-37.50" and pairs["strong", "weak"][7] == "0/3"
    first = [entry["comparison"]["p_value"] for entry in study.data["comparisons"]]
    assert [entry["adjusted"] for entry in study.data["comparisons"]][first.index(min(first))] == pytest.approx(
        min(1, 3 * min(first))
    )
    hard = {row[1]: row[2:] for row in table(study, "By difficulty").rows}
    assert hard["strong"] == ("3", "4", "1", "100.00") and hard["weak"] == ("3", "4", "1", "25.00")
    human = next(row for row in table(study, "By category").rows if row[1] == "human")
    assert human == ("chartqa", "human", "100.00", "50.00", "50.00")
    page = (tmp_path / "leaderboard.html").read_text()
    assert "http" not in page and "p (Holm)" in page and "strong" in page
    assert "\\textbf{87.5}" in (tmp_path / "leaderboard.tex").read_text()


def test_runs_that_cannot_be_compared_are_named(runs, tmp_path):
    with pytest.raises(ConfigError, match="at least two runs"):
        named_runs([str(runs["weak"])])
    with pytest.raises(ConfigError, match="two runs are called 'weak'"):
        named_runs([str(runs["weak"]), f"weak={runs['strong']}"])
    with pytest.raises(ConfigError, match="no such folder"):
        named_runs(["x=nowhere", str(runs["weak"])])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no task was answered by all runs"):
        leaderboard({"a": runs["weak"], "b": tmp_path / "empty"}, tmp_path)


def test_scores_leave_as_csv_latex_json_and_a_model_index(runs, tmp_path):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    results = read_results(runs["strong"])
    rows = list(csv.DictReader(io.StringIO(export_results(results, "csv"))))
    head = next(row for row in rows if row["metric"].startswith("relaxed_pix2struct") and row["part"] == "")
    assert float(head["value"]) == 87.5 and head["n"] == "8" and head["limited"] == "True"
    assert {row["part"] for row in rows} >= {"human", "augmented", "macro"}
    index = yaml.safe_load(export_results(results, "model-index", name="mine"))["model-index"]
    name, (found,) = model_index_to_eval_results(index)
    assert name == "mine" and found.metric_value == 87.5 and found.dataset_name == "chartqa (8 of 2500 samples)"
    assert found.metric_args["protocol"].startswith("chartqa v1 ·") and found.metric_args["low"] < 87.5
    assert json.loads(export_results(results, "json"))["tasks"]["chartqa"]["num_samples"] == 8
    text = latex_table({"a_b": results})
    assert "a\\_b & 87.5" in text and "$^\\dagger$" in text and "textbf" not in text
    with pytest.raises(DataError, match="no results can be read"):
        read_results(tmp_path)


def test_a_pushed_card_takes_the_scores_along(runs, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mllm", "text_config": {"model_type": "qwen2"}}))
    card = model_card(folder, "me/mine", scores=runs["weak"])
    head = yaml.safe_load(card.split("---")[1])
    assert head["model-index"][0]["name"] == "mine"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 50.0


def test_a_card_sets_each_score_beside_what_is_reached_without_the_right_picture(tmp_path):
    def task(value, **ways):
        return {"metrics": [{"label": "exact_match v1", "value": value, "low": value - 8, "high": value + 8}], **ways}

    whole = task(57.5, blind=task(18.1), shuffled=task(20.0), prior=task(26.25), num_samples=160, header={})
    part = task(57.5, blind=task(18.1), shuffled=None, prior=None, num_samples=160, header={"limited": True})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllm", "text_config": {"model_type": "qwen2"}}))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"tasks": {"a": whole, "b": part}}))
    card = model_card(tmp_path, "me/mine", scores=tmp_path / "eval")
    assert "| a | 57.50 | 49.5 to 65.5 | 26.25 (prior) | 160 | exact_match v1 |" in card
    assert (
        "| b (a part of it) | 57.50 | 49.5 to 65.5 | 18.10 (blank, shuffled not measured, prior not measured) |" in card
    )


def test_two_tasks_of_one_name_and_answers_to_another_version_are_named(tmp_path):
    folder = mmvp(tmp_path / "d")
    spec = load_task("mmvp")
    assert load_tasks(["mmvp", spec, "mmvp"]) == [spec]
    with pytest.raises(ConfigError, match="two tasks are called 'mmvp' and differ"):
        load_tasks(["mmvp", spec.model_copy(update={"prompt": "{{ question }}"})])
    evaluate(
        RuleGenerator(constant("A")),
        [spec.model_copy(update={"version": 7})],
        tmp_path,
        data={"mmvp": folder},
        progress=False,
    )
    result = rescore(tmp_path / "mmvp.jsonl")
    assert any(
        "answers are to version 7 of the task, which is at version 1 now" in problem for problem in result.problems
    )
    header = json.loads((tmp_path / "mmvp.run.json").read_text())
    del header["task"]
    (tmp_path / "mmvp.run.json").write_text(json.dumps(header))
    with pytest.raises(DataError, match="is of a version that did not keep the task's declaration"):
        rescore(tmp_path / "mmvp.jsonl")


def test_a_row_without_options_is_named_and_not_asked(tmp_path):
    """Of a question of which the options are lost, a letter is right by chance: the row is left out and told, not averaged in."""
    head = ["index", "question", "image", "answer", "category", "l2_category", "A", "B", "C", "D"]
    lines = [
        [str(k), f"Which {k}?", PIXEL, "A", "c", "l", *(["x", "y", "z", "w"] if k != 2 else [""] * 4)] for k in range(4)
    ]
    table = "\n".join("\t".join(line) for line in [head, *lines]) + "\n"
    (tmp_path / "MMStar.tsv").write_text(table)
    generator = RuleGenerator(constant("A"))
    result = evaluate(generator, ["mmstar"], tmp_path / "o", data={"mmstar": tmp_path}, progress=False)["mmstar"]
    assert generator.asked == ["0", "1", "3"] and (result.num_samples, result.num_unusable) == (3, 1)
    assert result.problems == [
        "1 × unusable row: 2 (no options ([A, B, C, D] | present gives none), so the answer 'A' chooses nothing)"
    ]
    (tmp_path / "MMStar.tsv").write_text(table.replace("x\ty\tz\tw", "\t\t\t"))
    with pytest.raises(
        DataError, match=r"mmstar: 4 × unusable row in 4 rows and no sample is usable\. First, 0: no options"
    ):
        evaluate(generator, ["mmstar"], tmp_path / "p", data={"mmstar": tmp_path}, progress=False)


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_a_score_of_nought_over_groups_is_not_sure(tmp_path):
    """No pair is right: every bootstrap draw is 0, but two pairs say little (Wilson over 2 groups: up to 65.8 %)."""
    result = evaluate(
        RuleGenerator(constant("A")), ["mmvp"], tmp_path, data={"mmvp": mmvp(tmp_path / "d")}, progress=False
    )
    metric = result["mmvp"].metrics[0]
    assert metric.value == 0.0 and metric.low == 0.0 and metric.high == pytest.approx(65.76, abs=0.01)
    assert metric.method.startswith("Wilson over 2 groups")


def test_a_plan_counts_questions_images_and_tokens_and_takes_its_time_from_earlier_runs(runs):
    """Eight questions of 16 tokens and one picture each; an earlier run took 4 s for its eight, so half a second each."""
    header = runs["weak"] / "chartqa.run.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"seconds": 4.0}))
    data = {"chartqa": runs["weak"].parent.parent / "d", "chartqa_human": runs["weak"].parent.parent / "d"}
    specs = load_tasks(["chartqa", "chartqa_human"])
    plans = plan_tasks(specs, data=data, earlier=[runs["weak"]], processes=2)
    assert [(p.questions, p.images, p.most_tokens, p.seconds) for p in plans] == [(8, 8, 128, 2.0), (4, 4, 64, 1.0)]
    assert plan_rows(plans)[-1] == ("all", "12", "12", "192", "0", "0.1")
    assert plan_rows(plans, hour=3600.0)[-1][-1] == "3.00", "three seconds at a unit of money each"
    assert plan_rows(plan_tasks(specs, data=data))[-1][-1] == "–", "no earlier run: no time is made up"
