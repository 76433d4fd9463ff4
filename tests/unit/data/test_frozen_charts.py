"""Does a frozen benchmark tell the same questions from others, and the same pictures from other pixels?"""

from __future__ import annotations

import random

import pytest
import yaml

from mllm.cli.main import main
from mllm.data.charts.build import ChartSettings, build_charts
from mllm.data.charts.frozen import compare, freeze, load_frozen, rebuild
from mllm.data.charts.renderers import RENDERERS
from mllm.demo.real_tables import TEST_SOURCES
from mllm.errors import ConfigError, DataError, UnknownName


@pytest.fixture
def tables(tmp_path):
    rng = random.Random(0)
    for source in ("one", "two"):
        (tmp_path / "tables" / source).mkdir(parents=True)
        for k in range(3):
            rows = [f"{name},{rng.randint(10, 90)}" for name in ("Chile", "Peru", "Cuba", "Kenya")]
            (tmp_path / "tables" / source / f"t{k}.csv").write_text("\n".join([f"country,{source}{k}", *rows]) + "\n")
    return tmp_path / "tables"


def test_what_is_built_again_is_compared_with_what_was_frozen(tables, tmp_path):
    settings = ChartSettings((str(tables),), train_charts=0, test_charts=3, test_sources=("two",))
    build_charts(settings, tmp_path / "first")
    manifest = tmp_path / "mine.yaml"
    assert freeze(tmp_path / "first", manifest, description="mine").num_questions == 6
    frozen, differences = rebuild(str(manifest), tmp_path / "second")
    assert differences == [] and set(frozen.pictures) == {"matplotlib"} and frozen.drawn_with["matplotlib"]

    picture = next((tmp_path / "second" / "test" / "matplotlib").glob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"\n")
    (line,) = compare(load_frozen(str(manifest)), tmp_path / "second")
    assert line.startswith("matplotlib: the same charts in other pixels")

    rows = (tmp_path / "second" / "test.jsonl").read_text()
    (tmp_path / "second" / "test.jsonl").write_text(rows.replace('"answer": "', '"answer": "not ', 1))
    with pytest.raises(DataError, match="matplotlib has other questions than the frozen ones"):
        compare(load_frozen(str(manifest)), tmp_path / "second")

    for table in (tables / "two").iterdir():
        table.write_text(table.read_text().replace("Chile", "Spain"))
    with pytest.raises(DataError, match="other questions"):
        rebuild(str(manifest), tmp_path / "third")
    with pytest.raises(ConfigError, match="drawn by matplotlib"):
        rebuild(str(manifest), tmp_path / "third", renderers=("gnuplot",))


def test_the_command_counts_what_it_built(tables, tmp_path, capsys, monkeypatch):
    """Of one renderer alone the questions are half of those that were frozen."""
    settings = ChartSettings(
        (str(tables),), train_charts=0, test_charts=2, test_sources=("two",), test_renderers=("matplotlib", "altair")
    )
    for name in ("draw", "_one"):
        monkeypatch.setattr(RENDERERS.get("altair"), name, getattr(RENDERERS.get("matplotlib"), name), raising=False)
    monkeypatch.setattr(RENDERERS.get("altair"), "require", lambda: None)
    build_charts(settings, tmp_path / "first")
    freeze(tmp_path / "first", tmp_path / "mine.yaml", description="mine")
    output = str(tmp_path / "again")
    monkeypatch.setattr(
        "sys.argv",
        ["mllm", "data", "rebuild", str(tmp_path / "mine.yaml"), "--renderers", "matplotlib", "--output", output],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and "again: 4 questions, the frozen ones" in capsys.readouterr().out


def test_a_longer_benchmark_begins_with_the_shorter_one(tables, tmp_path):
    """Answers to the first charts stay comparable when more are asked about; `real_charts_300` is such a beginning."""
    for count in (2, 4):
        settings = ChartSettings((str(tables),), train_charts=0, test_charts=count, test_sources=("two",))
        build_charts(settings, tmp_path / str(count))
    few, many = ((tmp_path / name / "test.jsonl").read_text() for name in ("2", "4"))
    assert many.startswith(few) and len(many) > len(few)
    for picture in (tmp_path / "2" / "test").rglob("*.png"):
        assert picture.read_bytes() == (tmp_path / "4" / picture.relative_to(tmp_path / "2")).read_bytes()
    short, long = load_frozen("real_charts_300"), load_frozen("real_charts")
    assert short.num_questions == 2400 and short.settings | {"test_charts": 600} == long.settings


def test_a_manifest_of_another_builder_or_package_is_refused(tables, tmp_path):
    shipped = load_frozen("real_charts")
    assert shipped.chart_settings().test_sources == TEST_SOURCES and shipped.num_questions == 4800
    with pytest.raises(UnknownName):
        load_frozen("real_chart")
    data = shipped.model_dump()
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(data | {"version": shipped.version + 1}))
    with pytest.raises(ConfigError, match="draw other charts"):
        load_frozen(str(path))
    path.write_text(yaml.safe_dump(data | {"packages": {"pandas": "0.1"}}))
    with pytest.raises(DataError, match=r"pip install pandas==0\.1"):
        rebuild(str(path), tmp_path / "none")
    path.write_text(yaml.safe_dump(data | {"settings": {"source": []}}))
    with pytest.raises(ConfigError, match=r"settings\.source: not a setting"):
        load_frozen(str(path)).chart_settings()
