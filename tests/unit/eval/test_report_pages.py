"""Does the report stay readable in size: one file for few samples, pages by filter for many, a chart where there are categories?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mllm.errors import ConfigError
from mllm.eval.predictions import iterate_predictions
from mllm.eval.report import page as report_page
from mllm.eval.report import samples
from mllm.eval.report.show import write_report
from mllm.eval.run import evaluate, report_again
from mllm.eval.studies.sensitivity import run_sensitivity
from tests.unit.eval.rules import RuleGenerator, constant, pixel_rule
from tests.unit.eval.test_runner import TASK, make_data, run
from tests.unit.eval.test_watch_and_mine import mmvp


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    """Sixty samples in two categories; a answers right, of b every third is declined."""
    folder = tmp_path_factory.mktemp("pages")
    data = make_data(folder / "d", 60)

    def rule(request):
        number = int(request.id[1:])
        return str(number % 10) if number % 2 == 0 else "I'm sorry, I can't tell." if number % 3 == 0 else "x"

    result, _ = run(data, folder / "o", rule, blind=True)
    return result, folder / "o"


def test_many_samples_stand_on_pages_by_filter_and_their_pictures_are_there(results, monkeypatch) -> None:
    result, folder = results
    monkeypatch.setattr(report_page, "WHOLE", 50)
    monkeypatch.setattr(report_page, "PER_PAGE", 20)
    write_report({TASK: result}, folder, show=False)
    names = sorted(path.name for path in (folder / "report").iterdir())
    assert {name.split(".")[1] for name in names} >= {"declined", "right", "wrong"} and len(names) >= 5
    front = (folder / "report.html").read_text()
    assert "class=s " not in front and len(front) < 60_000
    linked = re.findall(r'href="(report/[^"]+)"', front)
    assert sorted(Path(link).name for link in linked) == names
    first = (folder / "report/demo-charts.wrong.001.html").read_text()
    assert "30 samples, 1 to 20 on this page" in first and first.count("<div class=s ") == 20
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', first)
    assert len(pictures) == 20 and all((folder / "report" / picture).is_file() for picture in pictures)
    assert 'href="../report.html#demo-charts"' in first and 'href="demo-charts.wrong.002.html"' in first
    assert "blind answer" in first
    monkeypatch.setattr(report_page, "WHOLE", 2000)
    write_report({TASK: result}, folder, show=False)
    assert not list((folder / "report").iterdir()), "pages of an earlier report are gone"
    assert (folder / "report.html").read_text().count("data:image/jpeg;base64,") == 60


def test_of_very_many_samples_those_with_pictures_are_listed(results, monkeypatch) -> None:
    result, folder = results
    monkeypatch.setattr(samples, "LISTED", 12)
    rows = iterate_predictions(Path(result.path))
    kept = sorted((folder / "thumbnails").iterdir())[:4]
    few = folder / "few"
    few.mkdir()
    for path in kept:
        (few / path.name).write_bytes(path.read_bytes())
    found = samples.list_samples(result, rows, (), few)
    assert found.total == 60 and found.counts["wrong"] == 30 and found.counts["right"] == 30
    assert len(found.rows) == 12
    with_picture = [all((few / f"{digest[:24]}.jpg").is_file() for digest in row["images"]) for row, _ in found.rows]
    assert with_picture == sorted(with_picture, reverse=True) and sum(with_picture) == 8


def test_the_report_says_in_sentences_what_it_found_and_draws_categories(results) -> None:
    result, folder = results
    write_report({TASK: result}, folder, show=False)
    page = (folder / "report.html").read_text()
    assert "The score is 50.0 % over 60 samples, 95 % interval" in page
    assert "<th class=n>declined %" in page
    chart = re.search(r"<svg class=chart.*?</svg>", page, re.DOTALL)
    assert chart is not None and "a (30)" in chart[0] and "b (30)" in chart[0] and "currentColor" in chart[0]
    assert [(one.name, one.value, one.num_samples) for one in result.categories] == [("a", 100.0, 30), ("b", 0.0, 30)]
    assert result.categories[0].low > 80 and result.categories[1].high < 20
    assert page.count("<tr><td><a href") == 1
    assert result.facts.refused == pytest.approx(10 / 60)


def test_metrics_that_agree_on_every_sample_are_told_once(tmp_path) -> None:
    result, _ = run(make_data(tmp_path / "d", 8), tmp_path / "o", lambda request: request.id[1:])
    write_report({TASK: result}, tmp_path / "o", show=False)
    page = (tmp_path / "o/report.html").read_text()
    assert len(result.metrics) > 1 and len(report_page.own_metrics(result)) == 1
    assert "agree on every sample" in page and "relaxed_strict v2, relaxed_pix2struct v1" in page
    assert "<th class=n>blind" not in page, "no column of dashes where no blind run was made"


def test_a_file_with_fewer_rows_than_were_published_is_named(tmp_path, capsys) -> None:
    """No limit was asked for: the file itself is short (MMVP has 300 questions)."""
    data = {"mmvp": mmvp(tmp_path / "d")}
    results = evaluate(RuleGenerator(constant("A")), ["mmvp"], tmp_path / "o", data=data, progress=False)
    write_report(results, tmp_path / "o")
    count = results["mmvp"].num_samples
    said = f"{count} samples of 300: not a benchmark score"
    page = (tmp_path / "o/report.html").read_text()
    assert count < 300 and said in page and said in (tmp_path / "o/report.md").read_text()
    assert said in " ".join(capsys.readouterr().out.split())


def test_everything_beside_a_score_stands_in_the_report_as_a_number(tmp_path) -> None:
    """Tokens, milliseconds, refusals, sensitivity and difficulty by other runs: in HTML and in Markdown."""
    folder = make_data(tmp_path / "d", 24)
    run(folder, tmp_path / "weak", lambda r: "no" if int(r.id[1:]) % 2 else str(int(r.id[1:]) % 10), name="weak")
    run(folder, tmp_path / "mine", lambda r: str(int(r.id[1:]) % 10) if int(r.id[1:]) % 3 else "I cannot tell.")
    data = {TASK: folder}
    run_sensitivity(RuleGenerator(pixel_rule), [TASK], tmp_path / "mine", ways=["jpeg"], data=data, progress=False)
    results = report_again(tmp_path / "mine", against=[tmp_path / "weak"], show=False)
    levels = [(one.name, one.value, one.num_samples) for one in results[TASK].difficulty]
    assert levels == [
        ("all of 1 other run right", pytest.approx(200 / 3), 12),
        ("none of 1 other run right", pytest.approx(200 / 3), 12),
    ]
    page, text = ((tmp_path / "mine" / name).read_text() for name in ("report.html", "report.md"))
    for told in (
        "new tokens",
        "ms an answer",
        "declined %",
        "flips by jpeg %",
        "difficulty by",
        "none of 1 other run right",
    ):
        assert told in page and told in text
    assert "| 33.3 |" in text, "eight of 24 answers decline"
    with pytest.raises(ConfigError, match=r"holds no demo_charts\.jsonl"):
        report_again(tmp_path / "mine", against=[tmp_path / "d"], show=False)
