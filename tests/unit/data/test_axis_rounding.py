"""Do training answers keep to the digits that an axis tells, and does everything else stay as it was?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm.data.charts.axis_rounding import as_read, step_of
from mllm.data.charts.build import ChartSettings, _train_rows, build_charts
from mllm.data.charts.chart import Chart, Series, shown
from mllm.errors import ConfigError

BARS = Chart("bar", "t/a", "Sizes", "who", "size", ("Ann", "Bob", "Cid"), (Series("size", "red", (842.0, 616.0, 0.0)),))


def values(chart):
    return [shown(value) for value in chart.series[0].values]


@pytest.mark.parametrize(("span", "step"), [(842, 5), (1000, 10), (0.34, 0.002), (7, 0.05), (60, 0.5)])
def test_the_step_is_one_that_axes_have(span, step):
    assert step_of(span, 0.01) == pytest.approx(step)


def test_values_on_an_axis_lose_what_cannot_be_read_and_printed_ones_do_not():
    assert values(as_read(BARS, 0.01)) == ["840", "615", "0"]
    assert values(as_read(BARS, 0.05)) == ["840", "620", "0"]
    assert as_read(replace(BARS, printed=True), 0.01) == replace(BARS, printed=True)
    assert as_read(BARS, 0.0) == BARS
    small = replace(BARS, series=(Series("size", "red", (900.0, 0.312, 0.0)),))
    assert values(as_read(small, 0.01)) == ["900", "0.312", "0"], "nothing becomes zero: a zero is right or wrong"
    tenths = replace(BARS, series=(Series("size", "red", (28.86, 0.31, 12.36)),))
    assert values(as_read(tenths, 0.01)) == ["28.8", "0.4", "12.4"], "no 0.30000000000000004"
    years = replace(BARS, series=(Series("size", "red", (1951.0, 1978.0, 2007.0)),))
    assert as_read(years, 0.05) == years


def test_training_texts_are_rounded_and_pictures_are_not():
    plain = ChartSettings(("x",), train_charts=1, kinds=("value", "difference"))
    said = []
    for settings in (plain, replace(plain, axis_rounding=0.01)):
        rows = {name: [] for name in ("train.jsonl", "captions.jsonl", "statements.jsonl")}
        jobs: dict = {}
        _train_rows([BARS], settings, settings.shares, Path(), rows, jobs)
        assert jobs["matplotlib"][0][1] == BARS
        said.append([json.dumps(rows[name]) for name in ("train.jsonl", "captions.jsonl")])
    for before, after in zip(*said, strict=True):
        assert ("616" in before or "842" in before) and "616" not in after and "842" not in after
        assert "615" in after or "840" in after


def test_a_share_that_would_make_answers_wrong_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"axis rounding 0\.1: a share of the axis from 0 to 0\.05"):
        build_charts(ChartSettings((str(tmp_path),), axis_rounding=0.1), tmp_path / "out")
