"""Does a study of arms say what its runs' answers say: scores apart by kind, floors, and what was expected against what came out?"""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import yaml

from mllm.cli.study import _curve
from mllm.data.lookup import load_mixture
from mllm.errors import ConfigError, DataError
from mllm.eval.predictions import prediction_path
from mllm.eval.studies.arms import (
    Cost,
    ExpectedSpec,
    arms_study,
    compare_arms,
    curve_lines,
    finished,
    load_arms,
    run_folder,
)
from mllm.eval.studies.study import save_study
from mllm.eval.task import load_task
from mllm.recipe import load_recipe

RENDERERS = ("matplotlib", "altair")


def write_answers(folder, right, *, blind=None):
    """200 questions over 50 tables, two renderers; ``right(k, renderer)`` says which are answered rightly."""
    rows = []
    for k in range(100):
        for renderer in RENDERERS:
            row = {
                "id": f"{renderer}-{k}", "question": "q", "prompt": "", "images": [], "target": ["yes"],
                "output": "yes" if right(k, renderer) else "no", "meta": {"renderer": renderer}, "cluster": f"table{k // 2}",
                "category": "value" if k % 4 else "count", "num_prompt_tokens": 1, "num_tokens": 1, "key": "",
            }  # fmt: skip
            rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    path = prediction_path(folder, "real_charts", blind)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text("{}")


@pytest.fixture
def spec(tmp_path):
    data = {
        "description": "test", "recipe": "demo", "task": "real_charts", "split_by": "renderer", "seen": ["matplotlib"],
        "arms": {"A": {"what": "both", "seeds": [0, 1], "blind": True}, "B": {"what": "one", "seeds": [0]}, "C": {"what": "later"}},
        "expected": [{"better": "A", "than": "B", "where": "unseen"}, {"better": "B", "than": "A"}, {"better": "A", "than": "C"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    return load_arms(str(tmp_path / "mine.yaml"))


def test_the_page_sets_what_came_out_against_what_was_expected(spec, tmp_path):
    with pytest.raises(DataError, match="no arm is trained"):
        arms_study(spec, tmp_path)
    for seed in (0, 1):
        write_answers(run_folder(tmp_path, "A", seed) / "eval", lambda k, r: r == "matplotlib" or k % 5 < 3)
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: k % 10 == 0, blind="gray")
    write_answers(run_folder(tmp_path, "B", 0) / "eval", lambda k, r: r == "matplotlib" and k % 5 < 3)
    study = arms_study(spec, tmp_path)
    scores, expected, kinds = study.tables
    by_arm = {row[0]: dict(zip(scores.headings, row)) for row in scores.rows}
    assert [by_arm["A"][part] for part in ("all", "matplotlib", "altair", "unseen")] == [
        "80.0",
        "100.0",
        "60.0",
        "60.0",
    ]
    assert by_arm["B"]["seen"] == "60.0" and by_arm["B"]["unseen"] == "0.0" and by_arm["A, gray"]["all"] == "10.0"
    assert [row[:4] for row in expected.rows] == [
        ("A > B", "unseen", "yes", "+60.0"),
        ("B > A", "all", "no, the other way", "-50.0"),
    ]
    spec.expected = [ExpectedSpec(better="B", than="A", within=points) for points in (1.0, 99.0)]
    costs_little, costs_less = arms_study(spec, tmp_path).tables[1].rows
    assert costs_little[:3] == ("B > A − 1", "all", "no, the other way") and costs_less[:3] == (
        "B > A − 99",
        "all",
        "yes",
    )
    assert set(kinds.headings) == {"arm", "value", "count"} and any("C-0" in note for note in study.notes)
    save_study(study, tmp_path)
    assert json.loads((tmp_path / "arms.json").read_text())["data"]["arms"]["A"]["1"]["all"] == 80.0


def test_of_two_arms_that_only_guess_nothing_is_told(spec, tmp_path):
    """No point is lost where there is none to lose."""
    folders = {name: run_folder(tmp_path, name, 0) / "eval" for name in ("A", "B")}
    for folder in folders.values():
        write_answers(folder, lambda k, r: r == "altair" and k % 5 == 0)
    expect = lambda **more: ExpectedSpec(better="A", than="B", within=1.0, **more)  # noqa: E731
    spec.expected = [expect(where="seen"), expect(where="unseen"), expect(where="unseen", floor=25.0), expect(floor=5)]
    verdicts = lambda: [row[2] for row in arms_study(spec, tmp_path).tables[1].rows]  # noqa: E731
    assert verdicts() == ["not told: both at 0.0", "yes", "not told: both at 20.0, guessing scores 25.0", "yes"]
    write_answers(folders["A"], lambda k, r: k % 4 == 0, blind="shuffled")
    assert verdicts()[1] == "not told: both at 20.0, guessing scores 25.0", "what was measured without the picture"
    write_answers(folders["B"], lambda k, r: r == "altair" and k % 5 < 2)
    assert verdicts()[1] == "no, the other way", "one of them does better than guessing"


def test_arms_with_a_size_are_drawn_as_a_curve(spec, tmp_path):
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    data["arms"]["A"]["size"], data["arms"]["B"]["size"], data["size_is"] = 20000, 5000, "training questions"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    sized = load_arms(str(tmp_path / "mine.yaml"))
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: r == "matplotlib" or k % 5 < 3)
    assert _curve(sized, tmp_path) == []  # one point is no curve
    write_answers(run_folder(tmp_path, "B", 0) / "eval", lambda k, r: r == "matplotlib" and k % 5 < 3)
    assert curve_lines(sized, tmp_path) == {
        "all": [(5000, 30.0), (20000, 80.0)], "seen": [(5000, 60.0), (20000, 100.0)], "unseen": [(5000, 0.0), (20000, 60.0)]
    }  # fmt: skip
    (path,) = _curve(sized, tmp_path)
    root = ElementTree.fromstring(path.read_text())
    said = " ".join(root.itertext())
    assert root.tag.endswith("svg") and all(
        word in said for word in ("5,000", "20,000", "unseen", "training questions")
    )
    assert _curve(spec, tmp_path) == []  # nobody has a size


def test_the_scaling_study_trains_the_same_arm_on_fewer_charts():
    scaling, shipped = load_arms("real_charts_scaling"), load_arms("real_charts")
    assert (scaling.recipe, scaling.task, scaling.seen) == (shipped.recipe, shipped.task, shipped.seen)
    plain, limits = load_recipe("real_charts"), []
    for arm in scaling.arms.values():
        recipe = load_recipe("real_charts", arm.overrides)
        assert [s.steps for s in recipe.stages] == [s.steps for s in plain.stages] and recipe.model == plain.model
        rows = [
            [
                (getattr(item.dataset, "name", item.dataset), item.repeat, item.limit)
                for item in load_mixture(stage.data).datasets
            ]
            for stage in recipe.stages
        ]
        limit = rows[0][0][2]
        assert rows == [
            [("real_charts_captions", None, limit)],
            [("real_charts", None, limit), ("real_charts_captions", 0.25, limit)],
        ]
        limits.append(limit)
    assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])


def test_arms_that_were_asked_other_questions_are_not_compared(spec, tmp_path):
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: True)
    write_answers(run_folder(tmp_path, "B", 0) / "eval", lambda k, r: False)
    path = prediction_path(run_folder(tmp_path, "B", 0) / "eval", "real_charts", None)
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    arms = finished(spec, tmp_path)
    with pytest.raises(DataError, match="different questions"):
        compare_arms(arms["A"], arms["B"], arms["A"][0].values > -1)
    with pytest.raises(DataError, match=r"B-0 has 199 answers, the first run 200"):
        arms_study(spec, tmp_path)


def test_a_study_names_arms_that_exist(spec, tmp_path):
    heads = load_arms("segmentation_demo")
    recipes = [load_recipe(heads.recipe, arm.overrides) for arm in heads.arms.values()]
    assert [list(recipe.model.heads) for recipe in recipes] == [["marks"], []] and load_task(heads.task).metrics
    shipped = load_arms("real_charts")
    assert {"A", "B", "C", "D", "E", "F"} <= set(shipped.arms) and shipped.seen == ["matplotlib"]
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    data["expected"][0]["than"] = "Z"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="there is no arm 'Z'"):
        load_arms(str(tmp_path / "mine.yaml"))


def test_the_prior_is_counted_per_kind_of_each_question_in_a_conversation(tmp_path):
    from mllm.eval.baselines import _training_answers
    from mllm.eval.task import load_task

    asked = [("Is a higher than b?", "no"), ("What colour is a?", "red")]
    said = [{"role": role, "content": text} for pair in asked for role, text in zip(("user", "assistant"), pair)]
    (tmp_path / "charts_test").mkdir()
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "train.jsonl").write_text(
        json.dumps({"messages": said, "kinds": ["comparison", "colour"]}) + "\n"
    )
    found = _training_answers(load_task("real_charts"), {"real_charts": tmp_path / "charts_test"})
    assert found is not None and found[0]["is comparison"] == {"no": 1} and found[0]["is colour"] == {"red": 1}
    said[1]["content"] = "3, 5 = no"  # as `mllm data build charts --worked` writes it
    worked = {"messages": said, "kinds": ["comparison", "colour"], "answers": ["no", "red"]}
    (tmp_path / "charts" / "train.jsonl").write_text(json.dumps(worked) + "\n")
    assert _training_answers(load_task("real_charts"), {"real_charts": tmp_path / "charts_test"}) == found


def test_an_arm_may_have_a_recipe_of_its_own_or_no_training(spec, tmp_path):
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    data["arms"]["D"] = {"what": "as it is", "checkpoint": "package:smollm2-135m-instruct", "generator": "ocr"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    assert load_arms(str(tmp_path / "mine.yaml")).arms["D"].generator == "ocr"
    data["arms"]["D"]["overrides"] = ["seed=1"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="neither recipe nor overrides"):
        load_arms(str(tmp_path / "mine.yaml"))


def test_the_page_states_what_a_picture_costs_each_arm(spec, tmp_path):
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: True)
    table = arms_study(spec, tmp_path, {"A": Cost(196, 12.34, 5.67, 145.0), "B": Cost(196, 1, 1, 1)}).tables[-1]
    assert "FLOPs" in table.caption and table.rows == [("A", "both", "196", "12.3", "5.7", "145.0")]


def test_a_clip_costs_an_arm_as_many_times_more_as_it_has_frames(spec, tmp_path):
    from mllm.recipe import load_recipe
    from mllm.train.preflight.picture_cost import picture_cost

    few, many, one = (
        picture_cost(load_recipe("video_demo", [f"model.video={video}"]))
        for video in ("{frames: 3}", "{frames: 6}", "null")
    )
    assert (few["frames"], many["frames"], one["frames"]) == (3, 6, 0)
    for key in ("tokens", "vision"):
        assert many[key] == pytest.approx(2 * few[key]) == pytest.approx(6 * one[key])
    assert many["language"] > 2 * few["language"] and many["millions"] == few["millions"]
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: True)
    table = arms_study(spec, tmp_path, {"A": Cost(**many)}).tables[-1]
    assert "one clip of the most frames" in table.caption and table.rows[0][:4] == (
        "A",
        "both",
        "6",
        str(many["tokens"]),
    )


def test_an_arm_that_the_system_killed_is_named(spec, tmp_path, monkeypatch, capsys):
    from mllm.cli import study as command

    for code, said in ((-9, "killed by signal 9, as a system out of memory does"), (1, "exit status 1")):
        monkeypatch.setattr(command, "_run", lambda *_, code=code: code)
        with pytest.raises(DataError, match="no arm is trained"):
            command.study(str(tmp_path / "mine.yaml"), arms="A", seeds="0", output=tmp_path / "out")
        assert f"failed: A-0 ({said}); see their .log in" in capsys.readouterr().err


def test_every_arm_of_the_study_sees_as_many_visual_tokens():
    from mllm.recipe import load_recipe
    from mllm.train.preflight.picture_cost import picture_cost

    arms, costs, of_model = load_arms("real_charts"), {}, {}
    for name, arm in arms.arms.items():
        if arm.checkpoint is None:
            recipe = load_recipe(arm.recipe or arms.recipe, arm.overrides)
            model = recipe.model.model_dump_json()  # many arms differ in what they learn, or from what
            costs[name] = of_model[model] = of_model.get(model) or picture_cost(recipe)
            experts = set((recipe.model.router or {}).get("experts", ()))
            for stage in recipe.stages:  # what training would refuse after the parts are read
                dropped = set(stage.options.get("drop_encoders", ()))
                assert not dropped or (
                    dropped <= set(recipe.model.encoders) - experts and len(recipe.model.encoders) > 1
                )
    assert {name: cost["tokens"] for name, cost in costs.items()} == dict.fromkeys("ABCDEFGHIJKLMNOPQR", 196)
    assert costs["A"]["vision"] > costs["B"]["vision"] and costs["G"]["vision"] > 3 * costs["A"]["vision"]
    assert costs["F"]["vision"] < costs["A"]["vision"] and costs["A"]["language"] == costs["B"]["language"]


def test_a_change_of_a_stage_reaches_the_arms_that_have_it():
    from mllm.cli.study import _check_stages, _fitting

    arms, change = load_arms("real_charts"), ["stages.agglomerate.steps=3", "stages.read.steps=2", "seed=4"]
    assert _fitting("real_charts", change) == change[1:] and _fitting("real_charts_student", change) == change
    _check_stages(arms, ["A", "H"], change)
    with pytest.raises(ConfigError, match=r"stages\.agglomerate\.steps: no chosen arm has this stage"):
        _check_stages(arms, ["A", "ocr"], change)


def test_the_page_of_questions_marks_every_arms_answer(spec, tmp_path):
    from mllm.eval.studies.arm_answers import chosen, save_answers

    with pytest.raises(DataError, match="no arm is trained"):
        save_answers(spec, tmp_path)
    write_answers(run_folder(tmp_path, "A", 0) / "eval", lambda k, r: True)
    write_answers(run_folder(tmp_path, "B", 0) / "eval", lambda k, r: r == "matplotlib")
    page = save_answers(spec, tmp_path).read_text()
    assert page.count("<div class=q>") == 20
    assert page.count("A right</span>") == 20 and "A wrong" not in page
    shown = page.count("matplotlib-")
    assert page.count("B right</span>") == shown and page.count("B wrong</span>") == 20 - shown and 0 < shown < 20
    second = tmp_path / "second"
    write_answers(run_folder(second, "A", 1) / "eval", lambda k, r: True)
    assert "A right</span>" in save_answers(spec, second).read_text(), "the first seed has not run"
    rows = [{"id": str(k), "category": "rare" if k < 3 else "common"} for k in range(100)]
    picked = chosen(rows, 20)
    assert picked == chosen(reversed(rows), 20) and len(set(picked)) == 20 and {"0", "1", "2"} < set(picked)
    write_answers(run_folder(tmp_path, "B", 0) / "eval", lambda k, r: True)
    path = prediction_path(run_folder(tmp_path, "B", 0) / "eval", "real_charts")
    path.write_text("".join(line for line in path.open() if json.loads(line)["id"] not in page))
    with pytest.raises(DataError, match="was not asked"):
        save_answers(spec, tmp_path)
