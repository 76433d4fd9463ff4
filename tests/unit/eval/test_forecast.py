"""Is what a run takes told before it begins, and after its first answers?"""

from __future__ import annotations

import pytest

from mllm.eval import forecast
from mllm.eval.forecast import FIRST, Forecast
from mllm.eval.run import _forecast, evaluate
from mllm.eval.settings import EvalSettings
from mllm.eval.task import load_tasks
from tests.unit.eval.rules import RuleGenerator, pixel_rule
from tests.unit.eval.test_runner import make_data


def test_earlier_runs_tell_time_and_cost_before_the_start():
    told: list[str] = []
    specs = load_tasks(["mmvp", "realworldqa"])
    Forecast(specs, rates={"mmvp": 2.0, "gqa": 9.0}, blind=True, processes=4, price=3.2, tell=told.append).announce()
    assert told == [
        "2 tasks, 3,195 questions; about 27 min in 4 processes, 5.68 at 3.2 an hour, by earlier runs of 1 of them"
    ], "3 · (300 · 2 s + 765 · the mean 2 s) / 4 = 1,597.5 s; 1,597.5 / 3600 · 3.2 · 4 = 5.68"
    Forecast(specs, limit=100, tell=told.append).announce()
    assert (
        told[1]
        == f"2 tasks, 200 questions; how long that takes is told after the first {FIRST} answers (--earlier FOLDER: before)"
    )
    Forecast(load_tasks(["vsibench", "mmvp"]), blind=True, tell=told.append).announce()
    assert told.pop().startswith(f"2 tasks, {6 * 5130 + 3 * 300:,} questions; "), (
        "videos are also shown in other orders"
    )
    Forecast(load_tasks(["demo"]), tell=told.append).announce()
    assert told[2].startswith("2 tasks, all questions of their files; ")


@pytest.mark.parametrize(("limit", "ids", "count"), [(None, ["a", "b"], 2), (1, ["a", "b"], 1), (None, None, 300)])
def test_named_questions_alone_are_counted(limit, ids, count, tmp_path, capsys):
    _forecast(load_tasks(["mmvp"]), EvalSettings(output_dir=tmp_path, limit=limit, ids=ids), tmp_path, 1)
    assert f"1 task, {count} questions; " in capsys.readouterr().err


def test_a_folder_of_fewer_questions_is_not_announced_as_the_whole_benchmark(tmp_path, capsys):
    settings = EvalSettings(output_dir=tmp_path, data_dirs={"mmvp": tmp_path})
    watched = _forecast(load_tasks(["mmvp"]), settings, tmp_path, 1)
    assert "1 task, all questions of their files; " in capsys.readouterr().err
    for _ in range(2):  # the question, and its control
        watched.begin("mmvp", 12, 0)
    assert capsys.readouterr().err == "mmvp: 12 questions, where the whole benchmark has 300\n"
    _forecast(load_tasks(["mmvp"]), settings.model_copy(update={"limit": 100}), tmp_path, 1)
    assert "1 task, at most 100 questions; " in capsys.readouterr().err


def test_the_first_answers_tell_the_rest(monkeypatch, tmp_path):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(forecast.time, "monotonic", lambda: float(next(clock)))
    told: list[str] = []
    watched = Forecast(load_tasks(["demo_charts"]), price=60.0, tell=told.append)
    watched.begin("demo_charts", 96, 4)
    for _ in range(FIRST + 5):
        watched.advance()
    assert told == ["0.062 s an answer, measured on the first 32; under a minute, 0.06 at 60 an hour for the 60 left"]


@pytest.mark.parametrize("count", [40, 20])
def test_a_run_tells_its_forecast_of_every_answer(count, tmp_path):
    told: list[str] = []
    watched = Forecast(load_tasks(["demo_charts"]), tell=told.append)
    data = {"demo_charts": make_data(tmp_path / "d", count)}
    evaluate(RuleGenerator(pixel_rule), ["demo_charts"], tmp_path / "o", data=data, progress=False, forecast=watched)
    assert [line.partition("; ")[2] for line in told] == (["under a minute for the 8 left"] if count == 40 else [])
