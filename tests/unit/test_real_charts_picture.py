"""Is the README's first picture drawn from measured figures, and does the README say the same?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_picture_and_the_readme_say_what_the_results_say(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from real_charts_picture import HEAD, draw, kinds
    finally:
        sys.path.pop(0)
    results = (ROOT / "benchmarks/results/real_charts_h200.txt").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {row.name: row for row in kinds(results)}
    assert readme.split("![")[1].partition("](")[2].startswith("docs/images/real_charts.svg)")  # the first picture
    whole = rows.pop("all")
    assert (
        f"{whole.score} % right" in readme
        and f"both encoders {whole.both} %" in readme
        and f"at most {whole.floor} %" in readme
    )
    assert f"the text encoder alone {whole.text} %" in readme and f"both {whole.longer} %" in readme
    assert sum(row.count for row in rows.values()) == whole.count == 1200
    for arm in ("score", "both", "text", "longer"):
        right = sum(round(getattr(row, arm) * row.count / 100) for row in rows.values())
        assert right == pytest.approx(getattr(whole, arm) * whole.count / 100, abs=1), arm
    assert rows["colour"].both > rows["colour"].text + 40 and rows["colour"].score > rows["colour"].text + 40
    assert rows["extreme"].score == min(row.score for row in rows.values())  # the README's sentence
    draw([whole, *rows.values()], tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")[:600]
    with pytest.raises(ValueError, match="no table below"):
        kinds(f"{HEAD}:\nnothing")
