"""How is a chart drawn as SVG that reads on a telephone, by day and by night? matplotlib draws; the page's own colours stay."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.errors import UnavailableError
from mllm.install import install_hint

INK, FAINT = "#010203", "#010204"
"""Drawn in these, written as the page's text colour, whole and a quarter."""
COLOURS = ("#3b7de8", "#d9661f", "#1a9448", "#9a5fd8")
"""Of lines and marks: at least 3 : 1 against white and against #151515."""
_WIDTH = 5.2
"""Inches: 374 points, so that a page of 420 pixels shows letters of 10 points as they are."""
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.0, "axes.edgecolor": FAINT,
             "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One line of `interval_chart`: a value with its interval, and how many samples it is of."""

    name: str
    value: float
    low: float
    high: float
    count: int


def interval_chart(bars: Sequence[Bar], *, whole: float, unit: str, label: str) -> str:
    """An SVG of values with their intervals, one under the other; a line stands at the ``whole``. label: what it shows, for those
    who do not see it. Raises `UnavailableError` without matplotlib."""
    figure, axes = _figure(0.55 + 0.27 * len(bars), label)
    places = range(len(bars), 0, -1)
    axes.axvline(whole, color=FAINT, linewidth=1.2)
    reach = [[max(bar.value - bar.low, 0.0) for bar in bars], [max(bar.high - bar.value, 0.0) for bar in bars]]
    axes.errorbar(
        [bar.value for bar in bars], list(places), xerr=reach, fmt="o", color=COLOURS[0], markersize=5, capsize=3, linewidth=1.6
    )  # fmt: skip
    axes.set_yticks(list(places), [f"{shortened(bar.name)} ({bar.count:,})" for bar in bars])
    axes.set_ylim(0.4, len(bars) + 0.6)
    if unit == "%":
        axes.set_xlim(-2, 102)
    axes.set_xlabel(f"score in {unit}, 95 % interval" if unit else "score, 95 % interval")
    axes.tick_params(length=0)
    return _svg(figure, label)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str, label: str, ticks: Sequence[float] = ()
) -> str:
    """An SVG of lines, name → points (x, y), with a legend. across: what x is. ticks: x of points that are marked, on a logarithmic axis.
    Raises `UnavailableError` without matplotlib."""
    figure, axes = _figure(2.3, label)
    for number, (name, points) in enumerate(lines.items()):
        mark = "o" if ticks else None
        axes.plot(
            *zip(*points), color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=name, marker=mark, markersize=4
        )
    if ticks:
        axes.set_xscale("log")
        axes.set_xticks(list(ticks), [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, label)


def shortened(name: str, most: int = 26) -> str:
    """A name short enough for the margin of a chart; the table beside it has the whole."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _figure(height: float, label: str) -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError(f"the chart ({label}) needs matplotlib; type {install_hint('eval')}") from None
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The figure as an element for a page: as wide as there is room, in the page's colours."""
    from html import escape

    from matplotlib import rc_context

    target = io.StringIO()
    salted: dict[Any, Any] = {**_SETTINGS, "svg.hashsalt": label}
    with rc_context(salted):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(rf"(fill|stroke): {FAINT}", r"\1: currentColor; \1-opacity: 0.25", text)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", text)
    shape = re.search(r'viewBox="[^"]+"', text)
    assert shape is not None
    return re.sub(r"<svg[^>]*>", f'<svg class=chart {shape[0]} role="img" aria-label="{escape(label)}">', text, count=1)
