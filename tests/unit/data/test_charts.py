"""Are charts drawn from tables, with answers that the table gives, and are bad tables counted with their reason?"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm.data.charts import build
from mllm.data.charts.build import ChartSettings, build_charts, charts_of_test
from mllm.data.charts.chart import COLOURS, Chart, Series, rounded, shown, transcript
from mllm.data.charts.choosing import draw_charts, usable_columns
from mllm.data.charts.duplicates import Known, fingerprint
from mllm.data.charts.near_misses import near_misses
from mllm.data.charts.new_labels import relabelled, words_of
from mllm.data.charts.questions import NOT_THERE, Balance, Question, questions
from mllm.data.charts.renderers import RENDERERS
from mllm.data.charts.renderers.base import Style, png
from mllm.data.charts.tables import TableFile, find_tables, names_apart, read_table
from mllm.errors import ConfigError, DataError

R_DAYS = (
    "/Td6WFoAAAFpIt42AgAhARwAAAAQz1jM4AICAO1dACkRB1RoEeRuUsqgM8UkXrtrnNeLUzcP1dKbshUqBwT4yAjz5XAXnl3ANLCsmtKqZnjMAMEa3sdX+hurd2IQ2Obs"
    "2KdmQibD5tPo0p38Tc8r4B3311uT7R/hpybJi9pmcGJuPzFt41RK1GB58DGU6VDgPx9kToLm0kpl9gGfjkZD/InRKINygwhfxMePVtLGCU9FfX6kP6Lotg0gV8PSMjkg"
    "SsyF1VoaXYDSI870J6+8xhly3ud1sWPFIF64UHa92CiIFnJRgmr3ZAkmvJhK5x+Fe91VaE9OazPtmPnD+RpYjinovw3Uk4pFIBlR9wAAAABCUcgVAAGFAoMEAADfsw0P"
    "PjANiwIAAAAAAVla"
)
"""R's save() of a data frame: who, day (Date), at (POSIXct), size."""
R_VECTOR = (
    "H4sIAAAAAAAAAwtyiTDmiuBiYGBgZmBhYmJgZgUyGVhDQ9x0LRiAIkAOIwMLAyeILgMS74AYWZAvOT+3IDG5JD4zr6Q4tRBNliUpsTgVKsYLFofQ/0A6QXY6iDCAgf0H"
    "VBqq5h8AfMAj6Z8AAAA="
)
"""R's save() of 1:5."""
BARS = Chart(
    "bar", "t", "gdp by country", "country", "gdp", ("Chile", "Peru", "Cuba", "Kenya"),
    (Series("gdp", "red", (10.0, 40.0, 20.0, 5.0)),), colours=("red", "blue", "green", "pink"), others=("Spain",),
)  # fmt: skip
LINES = Chart(
    "line", "t", "gdp over year", "year", "gdp", ("1990", "2000", "2010"),
    (Series("north", "red", (1.0, 5.0, 9.0)), Series("south", "blue", (8.0, 4.0, 2.0))),
)  # fmt: skip
POINTS = Chart(
    "scatter", "t", "b against a", "a", "b", (),
    (Series("x", "green", (1.0, 2.0, 4.0, 5.0, 6.0, 9.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)), Series("y", "orange", (3.0,), (2.0,))),
)  # fmt: skip
PIE = Chart(
    "pie",
    "t",
    "rows by kind",
    "kind",
    "rows",
    ("a", "b", "c"),
    (Series("rows", "red", (1.0, 2.0, 5.0)),),
    ("red", "blue", "gray"),
)


def asked(chart: Chart) -> dict[str, str]:
    found = {}
    for seed in range(20):
        for kind in questions(chart, random.Random(seed)).values():
            found |= {question.text: question.answer for question in kind}
    return found


def test_answers_are_the_charts_own():
    bars, lines, points = asked(BARS), asked(LINES), asked(POINTS)
    assert bars["What is the value for Peru?"] == "40"
    assert bars["Which has the lowest value?"] == "Kenya" and bars["Which has the highest value?"] == "Peru"
    assert bars["What colour is the bar of Cuba?"] == "green" and bars["Which bar is pink?"] == "Kenya"
    assert bars["How many bars are there?"] == "4" and bars["What is the value for Spain?"] == NOT_THERE
    assert (
        bars["Is the value for Peru higher than for Cuba?"] == "yes"
        and bars["Is the value for Cuba higher than for Peru?"] == "no"
    )
    assert bars["By how much is the value for Peru higher than for Chile?"] == "30"
    assert bars["Which has the second highest value?"] == "Cuba" and bars["What colour is the largest bar?"] == "blue"
    assert lines["Does the line of south rise or fall from its first to its last point?"] == "fall"
    assert lines["Which line ends highest?"] == "north" and lines["What is the value of north for 2000?"] == "5"
    assert points["Which has the most points?"] == "x" and points["How many groups of points are there?"] == "2"


def test_what_cannot_be_told_apart_is_not_asked():
    close = Chart("bar", "t", "", "", "", ("a", "b", "c"), (Series("", "red", (10.0, 10.2, 9.9)),))
    kinds = {kind for seed in range(10) for kind in questions(close, random.Random(seed))}
    assert not kinds & {"extreme", "comparison", "difference"} and "value" in kinds


def test_a_transcript_holds_every_number_and_colour():
    for chart in (BARS, LINES, PIE):
        text = transcript(chart)
        assert all(shown(v) in text for series in chart.series for v in series.values)
        assert all(colour in text for colour in chart.colours or [s.colour for s in chart.series])


def test_answers_within_a_template_stay_level():
    balance, rng = Balance({"comparison": 1.0}), random.Random(0)
    both = [Question("comparison", "t", f"q{k}", "yes" if k < 9 else "no") for k in range(10)]
    for number in range(40):
        pool = [question._replace(text=f"{question.text}/{number}") for question in both]
        balance.choose({"comparison": pool}, 1, rng, slack=3)
    assert balance.answers["t", "yes"] == balance.answers["t", "no"] == 20


def test_a_lead_is_over_the_rarest_answer_of_the_same_template_that_came_up():
    balance, rng = Balance({"value": 1.0}), random.Random(1)
    for number in range(300):
        template, answer = f"t{rng.randrange(3)}", str(rng.randrange(8))
        asked = Question("value", template, str(number), answer)
        counts = [n for (where, _), n in balance.answers.items() if where == template]
        assert balance._lead(asked) == balance.answers[template, answer] - min(counts, default=0)
        balance.choose({"value": [asked]}, 1, rng, slack=300)
    assert balance.answers.total() == 300


def test_a_near_miss_is_found_where_the_values_differ_by_less_than_is_written():
    close = Chart("line", "t", "v by year", "year", "v", ("1", "2"), (Series("A", "red", (1e6, 1e6 + 1e-7)),))
    assert len({text for text, _ in near_misses(close, random.Random(0))}) == 3


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (pd.DataFrame({"a": [1.0], "b": ["x"]}), "fewer than two rows"),
        (pd.DataFrame({"a": pd.date_range("2020-01-01", periods=9)}), "dates"),
        (pd.DataFrame({"a": [1, "x", 2.5, None]}), "mixed types"),
        (pd.DataFrame({"a": [np.nan] * 9, "b": [np.inf] * 9}), "missing"),
        (pd.DataFrame({"k": ["東京", "大阪", "京都"]}), "letters or signs that the renderers lack"),
        (pd.DataFrame({"k": ["😀", "😢", "🥶"], "v": [1, 2, 9]}), "letters or signs that the renderers lack"),
        (pd.DataFrame({"k": ["٣ kg", "٤ kg", "٥ kg"], "v": [1, 2, 9]}), "letters or signs that the renderers lack"),
        (
            pd.DataFrame({"k": [*map(str, range(1000)), "東京"], "v": np.arange(1001.0)}),
            "numbers without labels: labels in letters or signs that the renderers lack",
        ),
        (pd.DataFrame({"k": ["a", "b", "c"], "v": ["1,200", "3,400", "900"]}), "numbers written as text"),
        (pd.DataFrame({"k": ["a", "b", "c"], "v": ["12%", "34%", "9%"]}), "numbers written as text"),
        (pd.DataFrame({"k": ["a", "b", "c"]}), "none of groups: labels alone"),
        (pd.DataFrame({"k": [f"label {k}" for k in range(10_000)] * 2}), "groups"),
        (pd.DataFrame({"v": np.arange(9.0)}), "numbers without labels"),
        (
            pd.DataFrame({"k": [f"label {k}" for k in range(10_000)] * 2, "v": np.arange(20_000.0)}),
            "numbers without labels: more than 8 groups",
        ),
    ],
)
def test_tables_that_cannot_be_drawn_say_why(frame, reason):
    assert reason in str(usable_columns(frame)[1])


def test_charts_hold_the_tables_numbers():
    frame = pd.DataFrame({"country": ["Chile", "Peru", "Cuba", "Kenya"], "gdp": [123.456, 40.0, 20.0, 5.0]})
    columns, reason = usable_columns(frame)
    charts = draw_charts(frame, "t", columns, 6, random.Random(1))
    assert reason is None and charts
    table = {label: rounded(value) for label, value in zip(frame.country, frame.gdp)}
    for chart in charts:
        assert dict(zip(chart.categories, chart.series[0].values)).items() <= table.items()
        assert set(chart.others) == set(frame.country) - set(chart.categories)


def test_copies_and_parts_of_a_table_are_recognised():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"a": rng.normal(0, 1, 300), "b": rng.integers(0, 9, 300).astype(float), "year": np.arange(1900.0, 2200)}
    )
    other = pd.DataFrame(
        {"a": rng.normal(0, 1, 300), "b": rng.integers(0, 9, 300).astype(float), "year": np.arange(1900.0, 2200)}
    )
    known = Known({"kept": fingerprint(frame, list(frame))})
    assert known.match(fingerprint(frame.iloc[40:90], ["a"])) == "kept"  # a part, too short for its codes
    assert known.match(fingerprint(frame.rename(columns={"b": "z"})[["z"]], ["z"])) == "kept"  # codes, all of them
    assert known.match(fingerprint(pd.concat([frame, other]), ["a"])) == "kept"  # an extension
    assert known.match(fingerprint(other, list(other))) is None  # the same years and codes from 0 to 8


def needs(name: str) -> object:
    missing = {"altair": "vl_convert", "ggplot2": "Rscript", "gnuplot": "gnuplot"}.get(name)
    absent = (missing == "vl_convert" and not _has(missing)) or (
        missing in ("Rscript", "gnuplot") and shutil.which(missing) is None
    )
    return pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"needs {missing}"))


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", [needs(name) for name in ("matplotlib", "altair", "ggplot2", "gnuplot")])
def test_every_renderer_draws_every_chart_in_its_colours(name):
    charts = [BARS, LINES, POINTS, PIE]
    style = Style(8.5, True, "#ffffff", False, 2.5, "upper right", False)
    for chart, image in zip(charts, RENDERERS.get(name)(448).draw([(c, style) for c in charts]), strict=True):
        small = np.asarray(Image.open(io.BytesIO(png(image, 448))).convert("RGB")).astype(int)
        for colour in chart.colours or [series.colour for series in chart.series]:
            wanted = np.array([int(COLOURS[colour][k : k + 2], 16) for k in (1, 3, 5)])
            assert (abs(small - wanted).max(-1) < 40).sum() > 12, f"{name} draws no {colour} in a {chart.type}"


def test_building_splits_by_source_and_counts_what_it_skips(tmp_path):
    rng = np.random.default_rng(1)
    for source in ("alpha", "beta"):
        for number in range(3):
            frame = pd.DataFrame(
                {"who": ["Ann", "Bob", "Cid", "Dan", "Eve"], "size": rng.uniform(1, 90, 5), "w": rng.uniform(1, 9, 5)}
            )
            (tmp_path / "in" / source).mkdir(parents=True, exist_ok=True)
            frame.to_csv(tmp_path / "in" / source / f"t{number}.csv", index=False)
    (tmp_path / "in" / "alpha" / "one.csv").write_text("a,b\n1,2\n")
    (tmp_path / "in" / "alpha" / "broken.parquet").write_bytes(b"no parquet")
    settings = ChartSettings(
        sources=(str(tmp_path / "in"),), train_charts=5, test_charts=3, test_sources=("beta",), size=160
    )
    manifest = build_charts(settings, tmp_path / "out")
    train, test = (
        [json.loads(line) for line in (tmp_path / "out" / f"{n}.jsonl").read_text().splitlines()]
        for n in ("train", "test")
    )
    assert {row["table"].split("/")[0] for row in train} == {"alpha"} and {
        row["table"].split("/")[0] for row in test
    } == {"beta"}
    assert (
        manifest["skipped"]["fewer than two rows"] == 1
        and sum("cannot be read" in reason for reason in manifest["skipped"]) == 1
    )
    assert manifest["tables"] == {"train": 3, "test": 3, "skipped": 2} and all(
        (tmp_path / "out" / r["image"]).is_file() for r in test
    )
    shown_by = charts_of_test(settings, tmp_path / "cache")
    assert [chart.table for chart in shown_by] == [row["table"] for row in test if row["id"].endswith("-0")]
    assert build_charts(settings, tmp_path / "out") == manifest  # complete: nothing is done again
    again = build_charts(settings, tmp_path / "again")
    assert again["files"] == manifest["files"] and again["images"] == manifest["images"]
    with pytest.raises(ConfigError, match="other settings"):
        build_charts(ChartSettings(sources=settings.sources, train_charts=4, test_charts=0), tmp_path / "out")
    old = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert old["settings"].pop("kinds") == []
    (tmp_path / "out" / "manifest.json").write_text(
        json.dumps(old)
    )  # as it was written before questions could be chosen
    assert build_charts(settings, tmp_path / "out") == old


def test_tables_called_alike_up_to_a_dot_are_each_known_as_the_test_s(tmp_path):
    """A copy of the first of them is as much a copy as one of the last; rows name what they have in common, as frozen sets do."""
    rng = np.random.default_rng(2)
    parts = {
        part: pd.DataFrame({"who": [f"n{k}" for k in range(20)], "size": rng.uniform(1, 90, 20)}) for part in "bcde"
    }
    for place in ("test", "train"):
        (tmp_path / "in" / place).mkdir(parents=True)
    for part in "bcd":
        parts[part].to_csv(tmp_path / "in" / "test" / f"a.{part}.csv", index=False)
    for part in "bde":
        parts[part].to_csv(tmp_path / "in" / "train" / f"copy_{part}.csv", index=False)
    settings = ChartSettings((str(tmp_path / "in"),), train_charts=2, test_charts=3, test_sources=("test",), size=96)
    build_charts(settings, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tables.json").read_text()) == {
        **{f"test/a.{part}.csv": "test" for part in "bcd"},
        **{f"train/copy_{part}": f"repeats the test table test/a.{part}.csv" for part in "bd"},
        "train/copy_e": "train",
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert rows and {row["table"] for row in rows} == {"test/a"}
    found = find_tables(str(tmp_path / "in" / "test"), tmp_path)
    assert names_apart(found) == [f"test/a.{part}.csv" for part in "bcd"]


def test_only_the_kinds_of_questions_that_are_wanted_are_asked(tmp_path):
    frame = pd.DataFrame({"who": ["Ann", "Bob", "Cid", "Dan", "Eve"], "size": [3.5, 30.2, 60.1, 81.7, 45.3]})
    for source in ("alpha", "beta"):
        (tmp_path / source).mkdir()
        frame.to_csv(tmp_path / source / "t.csv", index=False)
    settings = ChartSettings(
        (str(tmp_path / "alpha"), str(tmp_path / "beta")), train_charts=3, test_charts=2, test_questions=1, size=96,
        test_sources=("beta",), kinds=("colour", "count"),
    )  # fmt: skip
    found = build_charts(settings, tmp_path / "out")
    assert found["train_kinds"] and set(found["train_kinds"]) | set(found["test_kinds"]) == {"colour", "count"}
    asked = (tmp_path / "out" / "train.jsonl").read_text()
    assert "What colour" in asked and "Which " not in asked and "is drawn in" not in asked
    labels = build_charts(replace(settings, kinds=("label",)), tmp_path / "labels")
    assert set(labels["train_kinds"]) | set(labels["test_kinds"]) == {"label"}
    both = build_charts(replace(settings, kinds=("colour", "label")), tmp_path / "both")
    assert set(both["train_kinds"]) == {"colour"} and "Which " in (tmp_path / "both" / "train.jsonl").read_text()
    earlier = json.loads((tmp_path / "both" / "manifest.json").read_text())
    earlier["settings"]["kinds"] = ["colour"]  # as it was written when whoever wanted colours was asked labels too
    del earlier["labels_apart"]
    (tmp_path / "both" / "manifest.json").write_text(json.dumps(earlier))
    assert build_charts(replace(settings, kinds=("colour", "label")), tmp_path / "both") == earlier
    with pytest.raises(ConfigError, match="other settings"):
        build_charts(replace(settings, kinds=("colour",)), tmp_path / "both")
    with pytest.raises(ConfigError, match=r"kind of question 'colours': there are value.*label"):
        build_charts(replace(settings, kinds=("colours",)), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_worked_answers_and_new_labels_change_training_charts_alone(tmp_path):
    rng = np.random.default_rng(3)
    for source in ("alpha", "beta"):
        (tmp_path / source).mkdir()
        names = ["Ann", "Bob", "Cid", "Dan", "Eve"] if source == "alpha" else ["Fay", "Gus", "Hal", "Ida", "Jon"]
        for number in range(2):
            frame = pd.DataFrame({"who": names, "size": rng.uniform(1, 90, 5), "girth": rng.uniform(1, 90, 5)})
            frame.to_csv(tmp_path / source / f"t{number}.csv", index=False)
    plain = ChartSettings(
        (str(tmp_path / "alpha"), str(tmp_path / "beta")),
        train_charts=12,
        test_charts=4,
        size=96,
        test_sources=("beta",),
    )
    new = replace(plain, worked=True, new_labels=1.0)
    before, after = build_charts(plain, tmp_path / "plain"), build_charts(new, tmp_path / "new")
    assert after["files"]["test.jsonl"] == before["files"]["test.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "new" / "train.jsonl").read_text().splitlines()]
    said = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    bare = [answer for row in rows for answer in row["answers"]]
    assert len(said) == len(bare) and any(" - " in text for text in said) and any(", " in text for text in said)
    for text, answer in zip(said, bare):
        values, sign, last = text.partition(" = ")
        assert (last if sign else text) == answer
        if " - " in values:
            left, right = map(float, values.split(" - "))
            assert float(answer) == pytest.approx(left - right, rel=1e-5)
        elif sign:
            left, right = map(float, values.split(", "))
            assert answer == ("yes" if left > right else "no")
    build_charts(replace(plain, new_labels=0.5), tmp_path / "half")
    texts = {name: (tmp_path / name / "captions.jsonl").read_text().splitlines() for name in ("plain", "new", "half")}
    assert all(one != other for one, other in zip(texts["plain"], texts["new"], strict=True))
    assert 0 < sum(one != other for one, other in zip(texts["plain"], texts["half"], strict=True)) < len(texts["plain"])
    with pytest.raises(ConfigError, match=r"new labels for 1.5 of the training charts: a share from 0 to 1"):
        build_charts(replace(plain, new_labels=1.5), tmp_path / "no")


def test_new_labels_keep_what_a_chart_says():
    rng = random.Random(0)
    for chart in (BARS, LINES, POINTS, PIE):
        words = words_of([BARS, LINES, PIE])
        assert "Chile" in words and "1990" not in words
        new = relabelled(chart, words, rng)
        assert [s.values for s in new.series] == [s.values for s in chart.series] and new.colours == chart.colours
        names = [*new.categories, *new.others, *(s.name for s in new.series)]
        former = {*chart.categories, *chart.others, *(s.name for s in chart.series if len(chart.series) > 1)}
        assert {name for name in names if name in former} == {name for name in former if name.isdigit()}
        assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) <= 18
        assert len(new.categories) == len(chart.categories)
    assert relabelled(LINES, words, rng).categories == LINES.categories  # years stay
    listed = replace(LINES, title="north and south")
    new = relabelled(listed, words, rng)
    assert new.title == " and ".join(series.name for series in new.series) and "north" not in new.title


def test_a_near_miss_has_one_wrong_fact_more_than_the_one_before():
    series = (Series("A", "red", (10.0, 20.0, 30.0)), Series("B", "blue", (1.0, 2.0, 3.0)))
    chart = Chart("bar", "t", "size by year", "year", "size", ("1990", "1991", "1992"), series)
    truth = transcript(chart)
    assert truth == "bars; size by year; A red: 1990 10, 1991 20, 1992 30; B blue: 1990 1, 1991 2, 1992 3"
    for seed in range(20):
        found = near_misses(chart, random.Random(seed))
        wrong = [sum(a != b for a, b in zip(text.split(), truth.split(), strict=True)) for text, _ in found]
        assert wrong == [1, 2, 3, 4] and [round(8 * (1 - score)) for _, score in found] == wrong
    assert near_misses(chart, random.Random(1)) == near_misses(chart, random.Random(1))
    pie = Chart("pie", "t", "n", "", "n", ("x", "y"), (Series("n", "red", (1.0, 2.0)),), ("red", "blue"))
    assert [score for _, score in near_misses(pie, random.Random(0))] == [0.75, 0.5, 0.25, 0.0]
    points = Chart("scatter", "t", "a against b", "b", "a", (), (Series("a", "pink", (1.0, 2.0), (1.0, 3.0)),))
    ((text, score),) = near_misses(points, random.Random(0))
    assert score == 0 and text.startswith("points; a against b; a ") and not text.endswith("pink")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("ort;wert\nKöln;3,5\nBonn;4,5\nUlm;9,1\n".encode(), "separated by semicolons; save it with commas"),
        (b"who,size\nAnn,1,2,3\nBob,4,5,6\n", "rows of more cells than the header has"),
        ("ort,wert\nKöln,3\n".encode("latin-1"), "not in UTF-8"),
        ("ort,wert\nKöln,3\n".encode("utf-16"), "not in UTF-8"),
    ],
)
def test_a_text_file_that_would_be_read_as_another_table_says_what_is_wrong(tmp_path, content, reason):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_table(find_tables(str(tmp_path), tmp_path)[0])


def test_hidden_copies_of_tables_are_passed_over(tmp_path):
    for name in ("t.csv", ".t.csv", ".ipynb_checkpoints/t-checkpoint.csv", "__MACOSX/._t.csv"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("who,size\nAnn,1\nBob,2\nCid,5\n")
    assert [table.id for table in find_tables(str(tmp_path / "in"), tmp_path)] == ["in/t"]
    assert find_tables(str(tmp_path / "in" / ".t.csv"), tmp_path)  # named by its own path it is wanted


def test_decimals_are_numbers_and_days_of_r_are_no_numbers(tmp_path):
    sizes = pa.array([Decimal("1.50"), Decimal("2.25"), Decimal("9.00"), Decimal("4.75")])
    pq.write_table(pa.table({"who": ["Ann", "Bob", "Cid", "Dan"], "size": sizes}), tmp_path / "a.parquet")
    assert usable_columns(read_table(find_tables(str(tmp_path), tmp_path)[0]))[0].values == ["size"]
    pytest.importorskip("rdata")
    (tmp_path / "b.RData").write_bytes(base64.b64decode(R_DAYS))
    days = read_table(find_tables(str(tmp_path), tmp_path)[1])
    columns, reason = usable_columns(days)
    assert reason is None and columns.values == ["size"] and columns.keys == ["who"]
    assert columns.reasons == {"dates": 2} and str(days["day"].iloc[0].date()) == "2020-01-01"


def test_an_r_file_without_a_data_frame_says_so(tmp_path):
    pytest.importorskip("rdata")
    (tmp_path / "v.rda").write_bytes(base64.b64decode(R_VECTOR))
    with pytest.raises(DataError, match="holds no data frame"):
        read_table(find_tables(str(tmp_path), tmp_path)[0])


@pytest.mark.parametrize(("charts", "lines"), [(600, 15), (24_000, 30)])
def test_how_many_charts_are_drawn_is_told_of_few_and_of_many(tmp_path, monkeypatch, charts, lines):
    told: list[str] = []
    monkeypatch.setattr(build, "tell", told.append)
    monkeypatch.setattr(
        build, "spread", lambda work, parts, _: [({job[0]: "0" for job in jobs}, {}) for _, _, jobs in parts]
    )
    build._render({"matplotlib": [(tmp_path / f"{k}.png", BARS, None) for k in range(charts)]}, 64, 1)
    assert len(told) == lines and f"of {charts} charts drawn" in told[0]


def test_how_many_tables_are_read_is_told(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(build, "tell", told.append)
    monkeypatch.setattr(
        build, "spread", lambda work, jobs, _, **more: (build.TableReport(t.id, "skipped") for t, *_ in jobs)
    )
    files = [TableFile(f"s{number % 2}", f"t{number}", Path(f"{number}.csv")) for number in range(2_300)]
    assert len(build._look(files, ChartSettings(("x",)), 1)) == 2_300
    assert told[0] == "200 of 2,300 tables read" and len(told) == 11


def test_the_renderer_of_the_documentation_draws_every_chart(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/how-to/own-data.md").read_text(encoding="utf-8")
    code = next(part for part in page.split("```python\n") if part.startswith("# boxes.py")).partition("```")[0]
    monkeypatch.setattr(RENDERERS, "_classes", dict(RENDERERS._classes))
    names: dict[str, Any] = {}
    exec(code, names)
    (image,) = names["Boxes"](64).draw([(BARS, Style.of(random.Random(0)))])
    assert png(image, 64)


class Choosy:
    """A renderer of one's own, with a mistake in it."""

    breaks_on: tuple[str, ...] = ()

    def __init__(self, size):
        self.size = size

    def draw(self, charts):
        if any(chart.title in self.breaks_on for chart, _ in charts):
            raise AttributeError("'Chart' object has no attribute 'heading'")
        return [Image.linear_gradient("L").convert("RGB").resize((self.size, self.size)) for _ in charts]


def test_a_renderer_that_breaks_says_where_and_one_that_draws_nothing_is_refused(tmp_path, monkeypatch):
    """Its charts were left out without a word, and a build without any training row ended well."""
    told: list[str] = []
    monkeypatch.setattr(build, "tell", told.append)
    monkeypatch.setattr(build, "RENDERERS", {"mine": Choosy})
    jobs = {"mine": [(tmp_path / f"{k}.png", replace(BARS, title=str(k)), None) for k in range(4)]}
    monkeypatch.setattr(Choosy, "breaks_on", ("2",))
    hashes, failed = build._render(jobs, 64, 1)
    assert len(hashes) == 3 and len(failed) == 1
    (line,) = [line for line in told if line.startswith("!")]
    assert "mine: 1 of 4 charts are left out" in line and "'heading' (test_charts.py, line " in line
    monkeypatch.setattr(Choosy, "breaks_on", ("0", "1", "2", "3"))
    with pytest.raises(DataError, match=r"renderer mine drew none of 4 charts.*AttributeError: 'Chart' object has no"):
        build._render(jobs, 64, 1)
    monkeypatch.setattr(Choosy, "draw", lambda self, charts: [])
    with pytest.raises(DataError, match="draw gave 0 pictures for 1 charts"):
        build._render(jobs, 64, 1)


def test_a_place_without_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no table"):
        find_tables(str(tmp_path), tmp_path)
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match="holds no table"):  # pickles run code: read from installed packages only
        find_tables(str(tmp_path), tmp_path)
